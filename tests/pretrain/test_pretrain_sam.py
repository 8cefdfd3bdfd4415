"""Prompts and their answers, the loss, growing, the card's figures, and a whole run in miniature."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wris_lib.backbones.sam import SamImage, SamMasks, Segmenter, build_toy_sam
from wris_lib.data.toyworld.pretraining import Pool
from wris_lib.pretrain import prompts
from wris_lib.pretrain import sam as pretrain
from wris_lib.pretrain.prompts import LabelledImage
from wris_lib.pretrain.sam import PROMPTS, Batches, Round, SamWithOutlines, grow

SHIRT, TROUSERS, BUTTON, BALL, CRUMB = 16, 17, 18, 32, 48


@pytest.fixture
def labels() -> np.ndarray:
    """A person (shirt above trousers, a button too small to ask for), a ball without parts, and a crumb."""
    labels = np.zeros((256, 256), dtype=np.uint8)
    labels[40:100, 60:120] = SHIRT
    labels[50:55, 80:85] = BUTTON
    labels[100:160, 60:120] = TROUSERS
    labels[150:200, 180:230] = BALL
    labels[240:245, 10:15] = CRUMB
    return labels


@pytest.fixture
def pool(labels):
    images = np.stack([labels] * 3, axis=-1)  # pixels that say their label, so that a wrong flip shows
    return Pool(np.stack([images] * 6), np.stack([labels] * 6), None)


def names(mask: np.ndarray, labels: np.ndarray) -> set[int]:
    return set(np.unique(labels[mask]).tolist())


def test_what_can_be_asked_for(labels):
    image = LabelledImage(labels)
    assert set(image.objects) == {1, 2}  # not the crumb
    assert image.is_part(SHIRT) and image.is_part(TROUSERS)
    assert not image.is_part(BUTTON)  # too small
    assert not image.is_part(BALL)  # it is the whole object
    assert (image.mask(image.objects[1]) == np.isin(labels, [SHIRT, TROUSERS, BUTTON])).all()


def test_one_point_asks_for_the_part_in_the_majority(labels):
    image, rng = LabelledImage(labels), np.random.default_rng(0)
    answers = {SHIRT: [], BUTTON: [], BALL: [], 0: []}
    for _ in range(1500):
        prompt = prompts.point_prompt(image, 0.75, rng)
        x, y = prompt.points[0].astype(int)
        assert prompt.mask[y, x] and prompt.labels.tolist() == [1]
        if labels[y, x] in answers:
            answers[labels[y, x]].append(names(prompt.mask, labels))
    parts = sum(answer == {SHIRT} for answer in answers[SHIRT]) / len(answers[SHIRT])
    assert parts == pytest.approx(0.75, abs=0.08)
    assert all(answer in ({SHIRT}, {SHIRT, TROUSERS, BUTTON}) for answer in answers[SHIRT])
    assert all(answer == {SHIRT, TROUSERS, BUTTON} for answer in answers[BUTTON])
    assert all(answer == {BALL} for answer in answers[BALL])
    assert answers[0] and all(answer == {0} for answer in answers[0])


def test_several_points_lie_on_and_off_the_answer(labels):
    image, rng = LabelledImage(labels), np.random.default_rng(0)
    off_a_part = []
    for _ in range(400):
        prompt = prompts.points_prompt(image, 0.5, rng)
        assert prompt.points.shape == (2 * prompts.MOST_POINTS, 2) and prompt.points.dtype == np.float32
        x, y = prompt.points.T.astype(int)
        assert prompt.mask[y, x][prompt.labels == 1].all() and (prompt.labels == 1).any()
        assert not prompt.mask[y, x][prompt.labels == 0].any()
        if names(prompt.mask, labels) == {SHIRT}:
            off_a_part.append(np.isin(labels[y, x][prompt.labels == 0], [TROUSERS, BUTTON]).any())
    assert 0.5 < np.mean(off_a_part) < 1  # mostly denied on the same object


def test_points_are_spread_over_the_answers_box(labels):
    image, rng = LabelledImage(labels), np.random.default_rng(0)
    counts, shares = [], []
    for _ in range(600):
        prompt = prompts.spread_prompt(image, 0.2, rng)
        assert prompt.points.shape == (prompts.MOST_SPREAD, 2) and prompt.points.dtype == np.float32
        x, y = prompt.points[prompt.labels >= 0].T.astype(int)
        x0, y0, x1, y1 = prompts.tight_box(prompt.mask)
        assert (x0 <= x).all() and (x < x1).all() and (y0 <= y).all() and (y < y1).all()
        np.testing.assert_array_equal(prompt.mask[y, x], prompt.labels[prompt.labels >= 0] == 1)
        assert (prompt.labels == 1).any()
        counts.append(len(x))
        if names(prompt.mask, labels) == {SHIRT}:  # with a hole where the button is
            shares.append(prompt.mask[y, x].mean())
    assert set(counts) == set(range(2, prompts.MOST_SPREAD + 1))
    assert np.mean(shares) == pytest.approx((labels == SHIRT).sum() / 60**2, abs=0.02)


def test_a_thin_answer_has_a_positive_point_nevertheless():
    labels = np.zeros((256, 256), dtype=np.uint8)
    labels[np.arange(250), np.arange(250)] = BALL  # a diagonal: points in its box nearly always miss it
    image, rng = LabelledImage(labels), np.random.default_rng(0)
    for _ in range(30):
        prompt = prompts.spread_prompt(image, 0.2, rng)
        x, y = prompt.points[prompt.labels == 1].T.astype(int)
        assert len(x) and (labels[y, x] == BALL).all()


def test_boxes_enclose_the_answer_roughly(labels):
    image, rng = LabelledImage(labels), np.random.default_rng(0)
    assert prompts.tight_box(labels == BALL).tolist() == [180, 150, 230, 200]
    for _ in range(100):
        prompt = prompts.box_prompt(image, 0.3, rng)
        tight = prompts.tight_box(prompt.mask)
        sides = np.tile(tight[2:] - tight[:2], 2)
        assert (np.abs(prompt.box - tight) <= 0.1 * sides + 1e-4).all()


@pytest.mark.parametrize("labels", [np.zeros((256, 256), np.uint8), np.full((256, 256), 16, np.uint8)])
def test_images_of_nothing_and_without_background(labels):
    image, rng = LabelledImage(labels), np.random.default_rng(0)
    for sample in prompts.SAMPLERS.values():
        for _ in range(20):
            assert sample(image, 0.5, rng).mask.all()


def test_outlines_are_where_labels_change(labels):
    on, objects, parts = prompts.outlines(labels, 64).numpy()
    assert on.sum() * 16 == pytest.approx((labels >= 16).sum())
    x, y = 60 // 4, 100 // 4  # the person's left edge, where shirt meets trousers
    assert objects[12, x] and parts[12, x] and not objects[12, x + 3] and not parts[y - 4, x + 3]
    assert parts[y, x + 3] and not objects[y, x + 3]  # parts meet inside the object
    assert set(np.unique(objects)) == set(np.unique(parts)) == {0, 1}
    assert (objects <= parts).all()


def test_a_share_depends_on_its_number_alone_and_flips_together(pool):
    batches = Batches(pool.images, pool.labels, 128, 64, PROMPTS, late=99)
    first, again, other = batches(3), batches(3), batches(4)
    assert torch.equal(first["images"], again["images"])
    assert torch.equal(first["points"]["points"], again["points"]["points"])
    assert not torch.equal(first["box"]["box"], other["box"]["box"])
    assert first["images"].shape == (pretrain.IMAGES_PER_SHARE, 3, 128, 128)
    flipped = [image[0, 40, :64].float().mean() < 1 for image in first["images"]]  # the person stands on the left
    assert any(flipped) and not all(flipped)
    points, coverage = first["point"]["points"], first["point"]["coverage"]
    each = PROMPTS["point"]
    assert coverage.shape == (each * pretrain.IMAGES_PER_SHARE, 64, 64)
    assert 0 <= coverage.min() <= coverage.max() <= 1
    for i, (x, y) in enumerate(points[:, 0].tolist()):
        assert coverage[i, int(y / 2), int(x / 2)] > 0  # 128 pixels, 64 cells
        whole = {BALL: 2500}.get(int(first["images"][i // each, 0, int(y), int(x)]))
        if whole:
            assert coverage[i].sum() * 16 == pytest.approx(whole, rel=1e-3)
    for kind, count in PROMPTS.items():
        assert len(first[kind]["coverage"]) == count * pretrain.IMAGES_PER_SHARE
    image = first["images"][:, 0]
    outlined, changes = first["outlines"][:, 1, :, :-1], (image[:, ::2, 2::2] != image[:, ::2, :-2:2])
    assert outlined[changes].float().mean() > 0.8  # they flip with the picture, too (which was scaled, hence not 1)


def test_parts_are_asked_for_more_often_in_the_second_half(pool, monkeypatch):
    asked = []
    every = {kind: 1 for kind in prompts.SAMPLERS}
    kinds = dict.fromkeys(every, lambda image, share, rng: asked.append(share) or DUMMY)
    monkeypatch.setattr(pretrain, "SAMPLERS", kinds)
    DUMMY = prompts.box_prompt(LabelledImage(pool.labels[0]), 0.3, np.random.default_rng(0))
    batches = Batches(pool.images, pool.labels, 128, 64, every, late=7)
    for number, shares in ((6, prompts.PART_SHARES), (7, prompts.LATE_PART_SHARES)):
        asked.clear()
        batches(number)
        assert set(asked) == set(shares.values())


def test_losses_are_lowest_for_the_answer():
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, 2:6, 2:6] = 1.0
    right, wrong = (target * 2 - 1) * 9, (1 - target * 2) * 9
    losses = pretrain.mask_loss(torch.cat([right, right * 0, wrong], dim=1), target)
    assert (losses[:, 0] < 0.01).all()
    assert (losses.diff(dim=1) > 0.1).all()
    soft = torch.full((1, 1, 8, 8), 0.3)  # half-covered pixels want a logit in between
    at = [pretrain.mask_loss(torch.logit(soft * 0 + p), soft).item() for p in (0.1, 0.3, 0.6)]
    assert at[1] == min(at)


def test_iou_of_masks():
    a = torch.zeros(3, 4, 4, dtype=torch.bool)
    a[1, :2], a[2, :, :2] = True, True
    assert pretrain.mask_iou(a[[0, 1, 1]], a[[0, 1, 2]]).tolist() == pytest.approx([1, 1, 4 / 12])


class Oracle(Segmenter):
    """Answers every prompt with the whole (best predicted IoU), the part at its first point, and the background."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels

    def embed(self, image: Image.Image) -> SamImage:
        return SamImage(torch.zeros(1, 1, 1, 1), (256, 256), (256, 256))

    def decode(self, image, points=None, labels=None, boxes=None) -> SamMasks:
        at = boxes.reshape(-1, 2, 2).mean(1) if points is None else points[:, 0]
        found = [int(self.labels[y, x]) for x, y in at.int().tolist()]
        self.answer = np.stack([[self.labels == k, self.labels // 16 == k // 16, self.labels == 0] for k in found])
        return SamMasks(torch.zeros(len(found), 3, 1, 1), torch.tensor([[0.5, 0.9, 0.1]]).repeat(len(found), 1))

    def masks(self, image, decoded) -> np.ndarray:
        return self.answer


def test_the_cards_figures(labels):
    labels[labels == BUTTON] = SHIRT
    figures = pretrain.measure(Oracle(labels), np.zeros((1, 256, 256, 3), np.uint8), labels[None])
    assert figures["whole, 1 point"] == figures["whole, 3 points"] == figures["whole, true box"] == pytest.approx(100)
    assert figures["part, 1 point"] == pytest.approx(50)  # shirt and trousers are half of the person each
    assert figures["part, 3 points, best of three"] == pytest.approx(100)
    assert figures["1 point on a part gives the part"] == 0
    assert figures["1 point on a part gives the whole"] == 100


def test_it_learns(pool, monkeypatch):
    monkeypatch.setattr(pretrain, "IMAGES_PER_SHARE", 1)
    torch.manual_seed(0)
    model = SamWithOutlines(build_toy_sam(128))
    batches = Batches(pool.images, pool.labels, 128, 64, {"point": 1, "points": 1, "box": 1}, late=99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        terms = pretrain.loss(model, batches(step), step)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    unused = {"sam.prompt_encoder.mask_downscaling"}  # mask prompts are not trained
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or any(name.startswith(prefix) for prefix in unused), name


# -------------------------------------------------------------------------------------------------- two rounds


def cubic(distance: np.ndarray) -> np.ndarray:
    """The kernel of bicubic interpolation (Keys 1981), with torch's a = -0.75."""
    x, a = np.abs(distance), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resized(line: np.ndarray, length: int) -> np.ndarray:
    """The first axis between the centres of its cells, constant at the border."""
    places = (np.arange(length) + 0.5) * len(line) / length - 0.5
    rows = []
    for place in places:
        cells = np.arange(np.floor(place) - 1, np.floor(place) + 3)
        rows.append(np.tensordot(cubic(place - cells), line[cells.clip(0, len(line) - 1).astype(int)], axes=1))
    return np.stack(rows)


def test_a_larger_sam_has_the_weights_of_the_smaller_one():
    torch.manual_seed(0)
    small = build_toy_sam(64)
    small.image_encoder.pos_embed.data.normal_()  # upstream starts them at zero
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    large = grow(small, 192)
    state = large.state_dict()
    positions = state.pop("image_encoder.pos_embed")
    assert large.image_encoder.img_size == 192 and large.prompt_encoder.mask_input_size == (96, 96)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())  # left as it was
    rows = resized(before["image_encoder.pos_embed"][0].double().numpy(), 24)  # h w C
    expected = resized(rows.swapaxes(0, 1), 24).swapaxes(0, 1)
    np.testing.assert_allclose(positions[0], expected, atol=1e-5)


def test_a_grown_sam_can_be_trained_and_asked():
    torch.manual_seed(0)
    grown = grow(build_toy_sam(64), 128)
    assert all(parameter.requires_grad for parameter in grown.parameters())
    embedded = Segmenter(grown).embed(Image.new("RGB", (50, 100)))
    assert embedded.embedding.shape == (1, 96, 16, 16) and embedded.input_size == (128, 64)


def test_held_out_images_are_measured_apart(pool, monkeypatch):
    """Of six images the last three are held out and two of them measured: number 3, a scene, and 4, a ball alone."""
    asked = []
    monkeypatch.setattr(pretrain, "HELD_OUT", 3)
    monkeypatch.setattr(pretrain, "MEASURED", 2)
    monkeypatch.setattr(pretrain, "measure", lambda segmenter, images, labels: asked.append((images, labels)) or {})
    pool.labels[4][pool.labels[4] != BALL] = 0
    pool.images[...] = np.arange(6, dtype=np.uint8)[:, None, None, None]
    assert list(pretrain.measure_held_out(build_toy_sam(64), pool)) == ["object-centric", "scenes"]
    for number, (images, labels) in zip((4, 3), asked, strict=True):
        assert (images == number).all() and len(images) == 1
        assert np.array_equal(labels, pool.labels[[number]])


@pytest.fixture
def miniature(pool, tmp_path, monkeypatch):
    """Small pictures for SAM, few of them, and weights that are written elsewhere."""
    monkeypatch.setattr(pretrain, "IMAGES_PER_SHARE", 1)
    pool.labels[-1][100:] = 0  # the last two images, held out, are a scene and one object alone
    monkeypatch.setattr(pretrain, "HELD_OUT", 2)
    monkeypatch.setattr(pretrain, "MEASURED", 2)
    monkeypatch.setattr(pretrain, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(pretrain, "pool", lambda name: pool)
    last = Round(128, 1, 2e-4, {"spread": 2}, encoder=False)
    monkeypatch.setattr(pretrain, "ROUNDS", (Round(64, 3, 1e-3), Round(128, 2, 5e-4), last))


def test_a_run_in_miniature(miniature, tmp_path, capsys):
    pretrain.main(None, tmp_path / "run", "cpu")
    assert "whole, true box" in capsys.readouterr().out
    state = load_file(tmp_path / "weights" / "sam.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    build_toy_sam(128).load_state_dict(state)
    assert (tmp_path / "weights" / "sam.safetensors").stat().st_size < 6e6
    assert "sam.safetensors" in (tmp_path / "weights" / "SHA256SUMS").read_text()
    card = (tmp_path / "weights" / "sam.md").read_text()
    assert "| whole, true box |" in card and "| object-centric | scenes |" in card
    words = " ".join(card.split())
    assert "128×128 pixels in, masks of 64×64 out" in words and "2 images a step" in words
    asked = "of an image 8 questions (3 point, 2 points, 3 box)"
    assert (
        f"1. 3 steps at 64×64 pixels, peak 0.001; {asked}. 2. 2 steps at 128×128 pixels, peak 0.0005; {asked}." in words
    )
    rested = "of an image 2 questions (2 spread). The image encoder does not learn any more."
    assert f"3. 1 steps at 128×128 pixels, peak 0.0002; {rested}" in words
    before = (tmp_path / "weights" / "sam.safetensors").read_bytes()
    pretrain.main(None, tmp_path / "run", "cpu")  # nothing left to train: the same weights again
    assert (tmp_path / "weights" / "sam.safetensors").read_bytes() == before
    pretrain.main(1, tmp_path / "trial", "cpu")  # a trial stays where it is
    assert (tmp_path / "trial" / "sam.safetensors").exists()
    assert (tmp_path / "weights" / "sam.safetensors").read_bytes() == before


def test_the_image_encoder_rests_where_it_should(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "IMAGES_PER_SHARE", 1)
    torch.manual_seed(0)
    model = SamWithOutlines(build_toy_sam(64))
    model.sam.image_encoder.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = Batches(pool.images, pool.labels, 64, 32, {"spread": 2, "point": 1}, late=0)
    (log,) = pretrain.fit(model, pretrain.loss, batches, Round(64, 1, 1e-3).recipe(), tmp_path)
    assert {"spread_iou", "point_iou"} < set(log) and "outlines" not in log
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(("sam.mask_decoder.", "sam.prompt_encoder.")) for name in changed)


def test_the_second_round_goes_on_where_the_first_ended(miniature, tmp_path, monkeypatch):
    """And asks for parts more often from the middle of the first round on."""
    rounds = []

    def fit(model, loss, batches, recipe, folder, device):
        rounds.append((batches.input_size, batches.mask_size, batches.late, recipe.steps, recipe.learning_rate))
        seen.append(model.sam.mask_decoder.mask_tokens.weight.detach().clone())
        with torch.no_grad():
            model.sam.mask_decoder.mask_tokens.weight += 1
        return [{"seconds": 60.0}]

    seen = []
    monkeypatch.setattr(pretrain, "fit", fit)
    pretrain.main(None, tmp_path / "run", "cpu")
    assert rounds == [(64, 32, 2, 3, 1e-3), (128, 64, 0, 2, 5e-4), (128, 64, 0, 1, 2e-4)]
    assert torch.equal(seen[1], seen[0] + 1) and torch.equal(seen[2], seen[1] + 1)
    assert "3 minutes on CPU" in (tmp_path / "weights" / "sam.md").read_text()
