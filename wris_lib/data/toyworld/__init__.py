"""The toy world: picture-book scenes whose every object, part and sentence is known.

sprites      SVG drawings, rasterised once and recoloured
backgrounds  what the objects stand in front of
scenes       which objects stand where, and the pixels of that
grammar      what can be said, and the solver that knows what each phrase refers to
wording      how it is said
build        the datasets, on disk in RefCOCO's format
pretraining  image–caption pairs and masks for the toy CLIP and the toy SAM
"""

from wris_lib.data.toyworld.build import DATASETS, ensure

__all__ = ["DATASETS", "ensure"]
