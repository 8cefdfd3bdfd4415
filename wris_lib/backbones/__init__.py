"""Upstream models behind small faces: the same lines load the toy stack and the paper stack."""
