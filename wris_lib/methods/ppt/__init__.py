"""PPT (CVPR 2024): a small generator learns where to point, and frozen SAM turns its points into the mask."""
