"""Mask2Former's proposals: what IteRPrimE and the other papers that choose among masks were published with.

It was taught COCO's objects with their masks, so a figure reached with it is not one without masks in the strict sense.
The toy stack has none.

Source: Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022, as transformers
has it. IteRPrimE's released code takes the one with Swin-L, trained for COCO's panoptic task: 200 queries.
"""

from importlib.metadata import version

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch.nn.functional import interpolate

from wris_lib.backbones.checkpoints import get_stack, hub_download
from wris_lib.backbones.features import fingerprint
from wris_lib.backbones.proposals import Proposer
from wris_lib.errors import WrisError

SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # pixels: detectron2's default; transformers' copies squash to 384²
THRESHOLD = 0.35  # IteRPrimE's released code: a pixel belongs to a mask from here on


def mask2former_proposer(
    model: "transformers.Mask2FormerForUniversalSegmentation",
    processor: "transformers.Mask2FormerImageProcessor",
    size: dict[str, int] = SIZE,
) -> Proposer:
    """Proposals of a model of transformers: see `masks`.

    Args:
        model: it.
        processor: its image processor.
        size: see `SIZE`.
    """
    model = model.eval().requires_grad_(False)
    return Proposer(
        lambda image: masks(model, processor, image, size),
        lambda: [fingerprint(model, (__file__,)), processor.to_dict(), size, version("transformers")],
    )


@torch.no_grad()
def masks(
    model: "transformers.Mask2FormerForUniversalSegmentation",
    processor: "transformers.Mask2FormerImageProcessor",
    image: Image.Image,
    size: dict[str, int],
) -> Bool[np.ndarray, "p H W"]:
    """The masks of all queries, whatever class they are of, that which is most surely of something first.

    Raises:
        WrisError: the image is so thin that nothing of it would be left at the size that the model sees.
    """
    if min(image.size) * size["longest_edge"] < max(image.size):
        raise WrisError(f"an image of {image.width}×{image.height} pixels is too thin for Mask2Former; crop or pad it.")
    pixels = np.asarray(image.convert("RGB"))
    seen = processor(images=pixels, size=size, input_data_format="channels_last", return_tensors="pt")
    found = model(**seen.to(model.device))
    sure = found.class_queries_logits[0].softmax(dim=-1)[:, :-1].amax(dim=1)  # the last class is "nothing"
    logits = found.masks_queries_logits[0, sure.argsort(descending=True, stable=True)]
    sized = interpolate(logits[None].float(), (image.height, image.width), mode="bilinear")[0]
    return (sized.sigmoid() > THRESHOLD).cpu().numpy()


def load_mask2former(stack: str | None = None, device: str | torch.device | None = None) -> Proposer:
    """The stack's Mask2Former, from this machine; nothing is downloaded here.

    Args:
        stack: "toy" or "paper"; None: the default stack.
        device: None: CUDA when there is one.

    Raises:
        WrisError: no such stack, or it has no Mask2Former; the model is not on this machine, or transformers cannot
            load it, or is too old.
    """
    chosen = get_stack(stack)
    if chosen.mask2former is None:
        raise WrisError(f"the {chosen.name} stack has no Mask2Former; take the proposals of SAM.")
    import transformers
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 50):
        raise WrisError(
            f"transformers {transformers.__version__} would execute what is in a pickled file of weights; for"
            " Mask2Former use the environment of `make setup`."
        )
    try:
        model = Mask2FormerForUniversalSegmentation.from_pretrained(
            chosen.mask2former, local_files_only=True, weights_only=True
        )
        processor = AutoImageProcessor.from_pretrained(chosen.mask2former, local_files_only=True, use_fast=False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise WrisError(
            f"Mask2Former cannot be loaded from this machine; get it with `{hub_download(chosen.mask2former)}`."
        ) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return mask2former_proposer(model.to(device), processor)
