"""The Segmenter against upstream's own predictor, and its gradients against finite differences."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry

from wris_lib.backbones import checkpoints
from wris_lib.backbones.sam import Segmenter, decode_prompts, load_sam
from wris_lib.errors import WrisError


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(sam_model_registry["wris_toy"]())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(256, 256), (300, 180), (90, 200), (1, 1)])
@pytest.mark.parametrize("multimask", [True, False])
def test_equals_upstreams_predictor(segmenter, size, multimask):
    image = picture(*size)
    width, height = size
    points = np.array([[0.3 * width, 0.6 * height], [0.9 * width, 0.1 * height]])
    box = np.array([0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height])
    predictor = SamPredictor(segmenter.sam)
    predictor.set_image(np.array(image))
    embedded = segmenter.embed(image)
    for use_points, use_box in ((True, False), (False, True), (True, True)):
        expected, expected_iou, expected_logits = predictor.predict(
            point_coords=points if use_points else None,
            point_labels=np.array([1, 0]) if use_points else None,
            box=box if use_box else None,
            multimask_output=multimask,
        )
        decoded = segmenter.decode(
            embedded,
            torch.from_numpy(points).float()[None] if use_points else None,
            torch.tensor([[1, 0]]) if use_points else None,
            torch.from_numpy(box).float()[None] if use_box else None,
            multimask=multimask,
        )
        assert np.allclose(decoded.logits[0].detach().numpy(), expected_logits, atol=1e-4)
        assert np.allclose(decoded.iou[0].detach().numpy(), expected_iou, atol=1e-5)
        masks = segmenter.masks(embedded, decoded)[0]
        assert masks.shape == (3 if multimask else 1, height, width)
        assert (masks == expected).mean() > 0.999  # a logit of about 0 may fall on either side


def test_prompts_are_independent_and_padding_keeps_the_batch_rectangular(segmenter):
    embedded = segmenter.embed(picture(200, 120))
    points = torch.tensor([[[20.0, 30.0], [50.0, 60.0]], [[150.0, 100.0], [0.0, 0.0]]])
    labels = torch.tensor([[1, 0], [1, -1]])
    together = segmenter.decode(embedded, points, labels)
    for i in range(2):
        alone = segmenter.decode(embedded, points[i : i + 1], labels[i : i + 1])
        assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-4)
    moved = points.clone()
    moved[1, 1] = 99.0  # where a padding point lies must not matter
    assert torch.equal(segmenter.decode(embedded, moved, labels).logits, together.logits)


def test_every_prompt_can_have_its_own_image(segmenter):
    images = [segmenter.embed(picture(256, 256, seed)).embedding for seed in (1, 2)]
    points, labels = torch.tensor([[[40.0, 200.0]], [[90.0, 10.0]]]), torch.ones(2, 1, dtype=torch.long)
    together, _ = decode_prompts(segmenter.sam, torch.cat(images), points, labels, None)
    for i in range(2):
        alone, _ = decode_prompts(segmenter.sam, images[i], points[i : i + 1], labels[i : i + 1], None)
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_gradients_reach_points_and_boxes_and_nothing_else(segmenter):
    embedded = segmenter.embed(picture(300, 180))
    points = torch.tensor([[[120.0, 70.0], [200.0, 20.0]]], requires_grad=True)
    labels = torch.tensor([[1, 0]])
    boxes = torch.tensor([[60.0, 30.0, 220.0, 150.0]], requires_grad=True)

    def objective(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        decoded = segmenter.decode(embedded, points, labels, boxes)
        return decoded.logits.double().square().mean() + decoded.iou.double().sum()

    objective(points, boxes).backward()
    assert all(parameter.grad is None for parameter in segmenter.sam.parameters())
    for leaf, change in ((points, lambda d: (points + d, boxes)), (boxes, lambda d: (points, boxes + d))):
        assert leaf.grad.abs().sum() > 0
        step = 0.1 * leaf.grad / leaf.grad.norm()  # uphill, where a difference stands out from float32's noise
        with torch.no_grad():
            measured = (objective(*change(step)) - objective(*change(-step))).item()
        assert measured == pytest.approx(2 * (leaf.grad * step).sum().item(), rel=0.05)


def test_gradient_ascent_moves_a_point(segmenter):
    """The use that methods make of the gradient: a better point for a wanted mask."""
    embedded = segmenter.embed(picture(256, 256))
    labels = torch.ones(1, 1, dtype=torch.long)
    wanted = segmenter.decode(embedded, torch.tensor([[[60.0, 60.0]]]), labels).logits.sigmoid().round()
    point = torch.tensor([[[75.0, 50.0]]], requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=1.0)
    losses = []
    for _ in range(8):
        logits = segmenter.decode(embedded, point, labels).logits
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_best_mask_is_the_one_with_the_best_predicted_iou(segmenter):
    embedded = segmenter.embed(picture(120, 200))
    points = torch.rand(5, 1, 2) * 120
    decoded = segmenter.decode(embedded, points, torch.ones(5, 1, dtype=torch.long))
    best = segmenter.best_mask(embedded, decoded)
    assert best.shape == (5, 200, 120) and best.dtype == bool
    every = segmenter.masks(embedded, decoded)
    for i, k in enumerate(decoded.iou.argmax(1).tolist()):
        assert (best[i] == every[i, k]).all()


@pytest.mark.parametrize("size", [(20_000, 1), (3, 4000)])
def test_thin_images_work(segmenter, size):
    image = picture(*size)
    embedded = segmenter.embed(image)
    decoded = segmenter.decode(embedded, torch.tensor([[[0.0, 0.0]]]), torch.tensor([[1]]))
    assert segmenter.best_mask(embedded, decoded).shape == (1, size[1], size[0])
    with pytest.raises(WrisError, match="too thin for proposals"):
        segmenter.proposals(image)


def test_proposals_are_masks_of_the_image(segmenter):
    image = picture(100, 60)
    every = segmenter.proposals(
        image, points_per_side=3, iou_threshold=-10.0, stability_threshold=0.0, overlap_threshold=1.0
    )
    assert every.dtype == bool and every.shape[1:] == (60, 100) and 1 <= len(every) <= 27
    large = segmenter.proposals(
        image, points_per_side=3, iou_threshold=-10.0, stability_threshold=0.0, overlap_threshold=1.0, min_area=2000
    )
    assert len(large) == (every.sum((1, 2)) >= 2000).sum()
    assert segmenter.proposals(image, points_per_side=3, iou_threshold=2.0).shape == (0, 60, 100)


def test_prompts_that_make_no_sense(segmenter):
    embedded = segmenter.embed(picture(50, 50))
    points = torch.zeros(1, 2, 2)
    with pytest.raises(WrisError, match="SAM needs a prompt"):
        segmenter.decode(embedded)
    with pytest.raises(WrisError, match="every point needs a label.*got .1, 2, 2. and None"):
        segmenter.decode(embedded, points)
    with pytest.raises(WrisError, match="every point needs a label.*got .1, 2, 2. and .1, 3."):
        segmenter.decode(embedded, points, torch.ones(1, 3, dtype=torch.long))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A weights folder with a random toy SAM in it."""
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    state = {name: tensor.half() for name, tensor in sam_model_registry["wris_toy"]().state_dict().items()}
    save_file(state, tmp_path / "sam.safetensors")
    checkpoints.record_sha256(tmp_path / "sam.safetensors")
    return tmp_path, state


def test_load_sam_reads_the_packaged_half_precision_weights(weights):
    _, state = weights
    loaded = load_sam("toy", "cpu").sam.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in state.items())


def test_load_sam_refuses_damaged_and_foreign_weights(weights):
    folder, state = weights
    path = folder / "sam.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WrisError, match="sam.safetensors is damaged"):
        load_sam("toy", "cpu")
    checkpoints.record_sha256(path)  # even with a matching hash it cannot be read
    with pytest.raises(WrisError, match="cannot be read as a checkpoint"):
        load_sam("toy", "cpu")
    state.pop("mask_decoder.iou_token.weight")
    save_file(state, path)
    checkpoints.record_sha256(path)
    with pytest.raises(WrisError, match="another model.*iou_token"):
        load_sam("toy", "cpu")
    path.unlink()
    with pytest.raises(WrisError, match="sam.safetensors is missing"):
        load_sam("toy", "cpu")


def test_load_sam_knows_its_stacks():
    with pytest.raises(WrisError, match="there is no stack 'tpy'"):
        load_sam("tpy")
