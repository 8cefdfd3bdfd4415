"""SAM: from point and box prompts to masks.

Segment Anything (Kirillov et al. 2023) spends nearly all its time on the image and very little on a prompt. So an
image is embedded once, and then decoded as often as one likes: `embed`, then `decode`. A single point is ambiguous
(the shirt, or the person in it?), therefore every prompt gets three masks, and SAM's own guess of each mask's IoU
says which one it would choose.

The models are `segment_anything`'s own classes. Two things are ours. Upstream decodes under `no_grad`; here gradients
reach the point coordinates, which is what lets a method *learn* where to point. And upstream's decoder takes one image
at a time; `decode_prompts` takes a prompt and an image embedding per row, with the same weights and the same numbers.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn

from wris_lib.backbones.checkpoints import get_stack
from wris_lib.backbones.loading import load_weights
from wris_lib.errors import WrisError


def build_toy_sam(size: int = 192) -> Sam:
    """SAM for the toy world: patches of 8×8 pixels, masks half as large as the input; 2.5 million parameters.

    Args:
        size: side of the input in pixels, a multiple of 64. The shipped weights are for 192.
    """
    patch, width = 8, 96
    grid = size // patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=size,
            patch_size=patch,
            embed_dim=160,
            depth=6,
            num_heads=4,
            mlp_ratio=4,
            out_chans=width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            window_size=8,
            global_attn_indexes=(1, 3, 5),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=256, num_heads=4),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=width,
        ),
    )


sam_model_registry["wris_toy"] = build_toy_sam


@dataclass(frozen=True)
class SamImage:
    """An embedded image, ready for prompts.

    Args:
        embedding: the image encoder's output.
        original_size: (height, width) of the image in pixels.
        input_size: (height, width) after scaling the longer side to SAM's input; the rest is padding.
    """

    embedding: Float[Tensor, "1 c h w"]
    original_size: tuple[int, int]
    input_size: tuple[int, int]


@dataclass(frozen=True)
class SamMasks:
    """Masks for P prompts, M for each, at the decoder's own low resolution.

    Args:
        logits: above 0 is inside. They cover SAM's square input, padding included.
        iou: SAM's guess of each mask's IoU with the object that was meant, about 0 to 1.
    """

    logits: Float[Tensor, "p m h w"]
    iou: Float[Tensor, "p m"]


def decode_prompts(
    sam: Sam,
    embeddings: Float[Tensor, "#p c h w"],
    points: Float[Tensor, "p n 2"] | None,
    labels: Int[Tensor, "p n"] | None,
    boxes: Float[Tensor, "p 4"] | None,
) -> tuple[Float[Tensor, "p 4 h4 w4"], Float[Tensor, "p 4"]]:
    """Decode a prompt a row, each with its own image embedding, or all with the same one.

    Args:
        sam: upstream's model.
        embeddings: of the image encoder.
        points: (x, y) in pixels of SAM's square input.
        labels: 1 positive, 0 negative, -1 padding.
        boxes: XYXY in pixels of SAM's square input.

    Returns:
        Logits and predicted IoU of all four mask tokens: 0 is upstream's single mask, 1 to 3 are the alternatives.
    """
    prompts = (points, labels) if points is not None else None
    with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would move a point by about a pixel
        sparse, dense = sam.prompt_encoder(points=prompts, boxes=boxes, masks=None)
        positions = sam.prompt_encoder.get_dense_pe()
    # Upstream repeats one image embedding for every prompt and then adds the dense prompt. Handing over the sum as
    # the dense prompt, and zeros as the image, gives the same numbers and lets every prompt have its own image.
    return sam.mask_decoder.predict_masks(
        image_embeddings=torch.zeros_like(embeddings[:1]),
        image_pe=positions,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=embeddings + dense,
    )


class Segmenter:
    """SAM behind two verbs: `embed` an image once, `decode` many prompts.

    All coordinates are (x, y) pixels of the original image, boxes are XYXY. Weights are frozen.
    """

    def __init__(self, sam: Sam):
        self.sam = sam.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.sam.device

    @torch.no_grad()
    def embed(self, image: Image.Image) -> SamImage:
        """Embed an RGB image of any size, scaled and padded as SAM was trained."""
        height, width = self._input_size(image)
        height, width = max(height, 1), max(width, 1)  # upstream rounds a very thin image's short side to 0
        pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)[None].float()
        embedding = self.sam.image_encoder(self.sam.preprocess(tensor))
        return SamImage(embedding, (image.height, image.width), (height, width))

    def decode(
        self,
        image: SamImage,
        points: Float[Tensor, "p n 2"] | None = None,
        labels: Int[Tensor, "_ _"] | None = None,
        boxes: Float[Tensor, "p 4"] | None = None,
        multimask: bool = True,
    ) -> SamMasks:
        """Masks for P prompts on one image, each of N points, a box, or both.

        Gradients flow to `points` and `boxes`. They do not flow to `labels`, which only select an embedding.

        Args:
            image: from `embed`.
            points: (x, y) pixels of the original image.
            labels: [P, N], 1 for a point on the object, 0 for one off it, -1 for padding that is ignored.
            boxes: XYXY pixels of the original image.
            multimask: three masks a prompt; False gives the one that upstream advises for unambiguous prompts.

        Raises:
            WrisError: there is no prompt, or points and labels do not belong together.
        """
        if points is None and boxes is None:
            raise WrisError("SAM needs a prompt: give points with labels, or boxes.")
        if (points is None) != (labels is None) or (points is not None and points.shape[:2] != labels.shape):
            found = [None if t is None else tuple(t.shape) for t in (points, labels)]
            raise WrisError(
                "every point needs a label: expected points [P, N, 2] and labels [P, N],"
                f" got {found[0]} and {found[1]}."
            )
        (height, width), (input_height, input_width) = image.original_size, image.input_size
        scale = torch.tensor([input_width / width, input_height / height], device=self.device)
        if points is not None:
            points, labels = points.to(self.device) * scale, labels.to(self.device)
        if boxes is not None:
            boxes = boxes.to(self.device) * scale.repeat(2)
        logits, iou = decode_prompts(self.sam, image.embedding, points, labels, boxes)
        chosen = slice(1, None) if multimask else slice(0, 1)
        return SamMasks(logits[:, chosen], iou[:, chosen])

    @torch.no_grad()
    def masks(self, image: SamImage, decoded: SamMasks) -> Bool[np.ndarray, "p m height width"]:
        """All masks at the original image's size."""
        logits = self.sam.postprocess_masks(decoded.logits, image.input_size, image.original_size)
        return (logits > self.sam.mask_threshold).cpu().numpy()

    def best_mask(self, image: SamImage, decoded: SamMasks) -> Bool[np.ndarray, "p height width"]:
        """For each prompt the mask with the best predicted IoU, at the original image's size."""
        best = decoded.iou.argmax(dim=1)
        rows = torch.arange(len(best), device=best.device)
        chosen = SamMasks(decoded.logits[rows, best][:, None], decoded.iou[rows, best][:, None])
        return self.masks(image, chosen)[:, 0]

    def proposals(
        self,
        image: Image.Image,
        points_per_side: int = 12,
        iou_threshold: float = 0.2,
        stability_threshold: float = 0.4,
        stability_offset: float = 0.25,
        overlap_threshold: float = 0.7,
        min_area: int = 0,
    ) -> Bool[np.ndarray, "k height width"]:
        """Masks of everything: upstream's `SamAutomaticMaskGenerator`, a grid of single points, then filters.

        The defaults suit the toy SAM, which is rarely sure: its predicted IoU is also a guess at what was meant. With
        them it proposes about 40 masks a scene, among them 9 of 10 whole objects and 4 of 10 parts (IoU 0.5), in
        0.9 s on one thread. Upstream's for the real SAM: 32, 0.88, 0.95, 1.0, 0.7.

        Args:
            image: RGB, any size.
            points_per_side: of the grid.
            iou_threshold: least predicted IoU.
            stability_threshold: least IoU between the masks cut `stability_offset` above and below logit 0.
            stability_offset: in logits.
            overlap_threshold: of two masks whose boxes overlap more (IoU), the one with the lower predicted IoU goes.
            min_area: smallest mask in pixels.

        Returns:
            Masks, best predicted IoU first.

        Raises:
            WrisError: the image is so thin that nothing of it would be left at SAM's input size.
        """
        if min(self._input_size(image)) == 0:
            raise WrisError(
                f"an image of {image.width}×{image.height} pixels is too thin for proposals; crop or pad it."
            )
        generator = SamAutomaticMaskGenerator(
            self.sam,
            points_per_side=points_per_side,
            pred_iou_thresh=iou_threshold,
            stability_score_thresh=stability_threshold,
            stability_score_offset=stability_offset,
            box_nms_thresh=overlap_threshold,
        )
        records = [r for r in generator.generate(np.array(image.convert("RGB"))) if r["area"] >= min_area]
        records.sort(key=lambda record: -record["predicted_iou"])
        empty = np.zeros((0, image.height, image.width), dtype=bool)
        return np.stack([record["segmentation"] for record in records]) if records else empty

    def _input_size(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) after upstream's scaling of the longer side."""
        side = self.sam.image_encoder.img_size
        return ResizeLongestSide.get_preprocess_shape(image.height, image.width, side)


def load_sam(stack: str | None = None, device: str | torch.device | None = None) -> Segmenter:
    """SAM of a stack, "toy" or "paper".

    Args:
        stack: name; without one, the default stack.
        device: without one, the GPU if there is any.

    Raises:
        WrisError: there is no such stack; the checkpoint is missing, damaged or of another model.
    """
    checkpoint = get_stack(stack).sam
    sam = sam_model_registry[checkpoint.model_type]()
    load_weights(sam, checkpoint)
    return Segmenter(sam.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))
