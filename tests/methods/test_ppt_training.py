"""Datasets encoded once, batches as a function of their number, and the loss against one expression at a time."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.backbones import test_clip
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.feature_store import Rows
from wris_lib.backbones.sam import SamImage, SamMasks, Segmenter, build_toy_sam
from wris_lib.errors import WrisError
from wris_lib.methods.ppt import training
from wris_lib.methods.ppt.config import GeneratorConfig
from wris_lib.methods.ppt.labels import UNKNOWN, Collector
from wris_lib.methods.ppt.loss import LossWeights
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.pseudo import LabelledImages
from wris_lib.methods.ppt.training import DATASETS, Batches, TrainingData, encode, start, training_loss
from wris_lib.methods.ppt.vision import visual_features

tokenizer = test_clip.tokenizer

SIDE = 32  # of SAM's masks, whose input has 64 pixels
CONFIG = GeneratorConfig(
    stages=(1, 3, "surgery"),
    visual_channels=(24, 24, 20),
    word_channels=16,
    queries=4,
    points=3,
    fusion_width=8,
    fusion_heads=2,
    width=12,
    heads=3,
    feedforward=10,
)
HALF = {"atol": 5e-3, "rtol": 5e-3}  # features are kept as float16

# Dataset -> sizes (width, height) of its images, and (image, expression, candidates, referent) of its expressions.
H = (
    [(64, 64), (48, 24), (20, 40)],
    [
        (0, "the red dog", 1, 0),
        (1, "car left of the man", 2, UNKNOWN),
        (0, "car", 1, 0),
        (2, "dog and man", 2, UNKNOWN),
        (2, "man", 1, 0),
        (0, "the dog left of the car and the man", 3, UNKNOWN),
        (0, "red dog and red car", 2, UNKNOWN),
    ],
)
D_SEM = ([(64, 64), (64, 64)], [(0, "a red dog", 1, 0), (1, "a car", 1, 0)])
D_REF = (
    [(64, 64), (64, 64)],
    [(1, "left dog", 3, 2), (0, "the car", 2, 1), (0, "the red dog", 2, 0), (1, "the dog left of the car", 3, 1)],
)


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Two colours, divided somewhere, so that images differ more than noise does."""
    width, height = size
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-40, 40, (height, width, 3))
    pixels[:, rng.integers(1, width) :] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def labelled(name: str, content: tuple[list, list], seed: int) -> LabelledImages:
    """Images, and rectangles as candidates."""
    sizes, expressions = content
    rng = np.random.default_rng(seed)
    collector = Collector(SIDE)
    for image, text, count, referent in expressions:
        width, height = sizes[image]
        masks = np.zeros((count, height, width), dtype=bool)
        for mask in masks:
            top, left = rng.integers(height // 2), rng.integers(width // 2)
            mask[top : top + rng.integers(8, 20), left : left + rng.integers(8, 20)] = True
        collector.add(text, image, masks, referent)
    keys = [f"{name} {number} {size} {seed}" for number, size in enumerate(sizes)]
    rows = Rows(keys, lambda row: picture(sizes[row], 100 * seed + row))
    return LabelledImages(rows, collector.finish())


PARTS = [labelled("h", H, 1), labelled("d_sem", D_SEM, 2), labelled("d_ref", D_REF, 3)]
IMAGES = [part.images.load(row) for part in PARTS for row in range(len(part.images.keys))]
TEXTS = [text for part in PARTS for text in part.labels.expressions]


def tiny_generator(seed: int = 0, anchored: bool = True) -> PointGenerator:
    torch.manual_seed(seed)
    return PointGenerator(replace(CONFIG, anchored=anchored))


@pytest.fixture(scope="module")
def clip(tokenizer) -> Clip:
    return Clip(test_clip.tiny_model(), tokenizer, dense_size=32, device="cpu")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    sam = build_toy_sam(64)
    # An untrained SAM trusts its three masks nearly alike; rounding, which depends on threads, would choose among them.
    sam.mask_decoder.iou_prediction_head.layers[-1].bias.data = torch.tensor([0.0, 1.0, 3.0, 2.0])
    return Segmenter(sam)


@pytest.fixture(scope="module")
def data(clip, segmenter) -> TrainingData:
    return encode(clip, segmenter, CONFIG, *PARTS)


# ---------------------------------------------------------------------------------------------------------- the data


def test_every_expression_knows_its_dataset_its_image_and_its_words(data, clip, segmenter):
    of = ["H_sem", "H_ref", "H_sem", "H_ref", "H_sem", "H_ref", "H_ref", *["D_sem"] * 2, *["D_ref"] * 4]
    assert [DATASETS[number] for number in data.dataset] == of
    assert list(data.labels.expressions) == TEXTS
    assert data.labels.image.tolist() == [0, 1, 0, 2, 2, 0, 0, 3, 4, 6, 5, 5, 6]
    assert len(data.patches) == len(data.embeddings) == len(IMAGES)
    for row, image in enumerate(IMAGES):
        found = data.embeddings[[row]]
        torch.testing.assert_close(found["embedding"].float(), segmenter.embed(image).embedding, **HALF)
        assert found["original_size"].tolist() == [[image.height, image.width]]
    assert data.word[0] == data.word[TEXTS.index("the red dog", 1)]  # equal sentences are encoded once
    for e, text in enumerate(TEXTS):
        words, _ = clip.word_features([text])
        torch.testing.assert_close(data.words[data.word[[e]]]["words"].float(), words, **HALF)


def test_datasets_are_chosen_by_name(data):
    assert data.of(["H_ref"]).tolist() == [1, 3, 5, 6]
    assert data.of(["D_sem", "H_sem"]).tolist() == [0, 2, 4, 7, 8]
    assert data.of(DATASETS).tolist() == list(range(13)) and len(data.of([])) == 0


def test_other_referents_leave_the_rest(data):
    other = data.with_referents(np.zeros(13, dtype=int))
    assert not other.labels.referent.any() and (data.labels.referent == UNKNOWN).sum() == 4
    assert other.patches is data.patches and other.labels.masks is data.labels.masks


def test_inputs_are_those_of_direct_encoding(data, clip):
    chosen = np.array([11, 1, 6, 0, 10])
    inputs = data.inputs(chosen)
    assert set(inputs) == {"visual", "words", "mask", "image", "directions"}
    used = [0, 1, 5]  # each image once
    assert [used[image] for image in inputs["image"]] == data.labels.image[chosen].tolist()
    seen = visual_features(clip, CONFIG, [IMAGES[row] for row in used])
    for found, direct in zip(inputs["visual"], seen, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, direct, **HALF)
    words, mask = clip.word_features([TEXTS[e] for e in chosen])
    assert torch.equal(inputs["mask"], mask)
    torch.testing.assert_close(inputs["words"], words * mask[..., None], **HALF)


# ----------------------------------------------------------------------------------------------------------- batches


def flat(batch: dict) -> list[Tensor]:
    found = []
    for value in batch.values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (dict, list)):
            found += flat(value if isinstance(value, dict) else dict(enumerate(value)))
    return found


@pytest.fixture
def drawn(monkeypatch):
    """Expressions of each batch, as the pseudo-labels are asked for them."""
    seen, draw = [], training.LabelledExpressions.draw

    def noted(self, chosen, *rest):
        seen.append(chosen)
        return draw(self, chosen, *rest)

    monkeypatch.setattr(training.LabelledExpressions, "draw", noted)
    return seen


def test_a_batch_depends_on_its_number_alone(data):
    first, second = (Batches(data, data.of(DATASETS), 3, seed=5) for _ in range(2))
    second(7)
    for a, b in zip(flat(first(3)), flat(second(3)), strict=True):
        assert torch.equal(a, b)
    places = [
        Batches(data, data.of(DATASETS), 3, seed)(number)["labels"]["points"].flatten()[:6].tolist()
        for seed, number in ((5, 3), (5, 4), (6, 3))
    ]
    assert places[0] != places[1] and places[0] != places[2] and places[1] != places[2]


@pytest.mark.parametrize("names", [("H_sem",), ("H_ref", "D_ref"), ("D_sem", "H_sem", "D_ref")])
def test_a_batch_has_expressions_of_the_given_ones_only(data, drawn, monkeypatch, names):
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 5)
    monkeypatch.setattr(training, "EXPRESSIONS_PER_IMAGE", 2)
    given = data.of(names)
    batches = Batches(data, given, 3, seed=0)
    for number in range(30):
        batches(number)
        images = data.labels.image[drawn[-1]]
        assert set(drawn[-1]) <= set(given)
        # Five images, each with two of its expressions, or with the only one.
        rest = drawn[-1].tolist()
        for _ in range(5):
            of_image = [e for e in given if data.labels.image[e] == data.labels.image[rest[0]]]
            group = [rest.pop(0) for _ in range(min(2, len(of_image)))]
            assert set(group) <= set(of_image) and len(set(group)) == len(group)
        assert not rest and len(set(images)) <= 5
    assert set(np.concatenate(drawn)) == set(given)  # and none is left out


def test_images_are_drawn_equally_often(data, drawn, monkeypatch):
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 400)
    monkeypatch.setattr(training, "EXPRESSIONS_PER_IMAGE", 3)
    given = data.of(DATASETS)
    Batches(data, given, 3, seed=0)(0)
    images = np.unique(data.labels.image[given])
    counts = np.array([min(3, (data.labels.image[given] == image).sum()) for image in images])
    times = [(data.labels.image[drawn[0]] == image).sum() for image in images] / counts
    assert counts.min() == 1 and counts.max() == 3
    np.testing.assert_allclose(times, 400 / len(images), rtol=0.4)


def test_what_is_in_a_batch_belongs_together(data, drawn, monkeypatch):
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 4)
    monkeypatch.setattr(training, "MASKS_PER_STEP", 5)
    batch = Batches(data, data.of(DATASETS), 2, seed=1)(0)
    (chosen,) = drawn
    expected = data.inputs(chosen)
    for name in ("words", "mask", "image", "directions"):
        assert torch.equal(batch["inputs"][name], expected[name])
    labels = batch["labels"]
    for row, e in enumerate(chosen):
        masks = torch.from_numpy(data.labels.candidates(int(e))).float()
        assert torch.equal(labels["masks"][row, : len(masks)], masks)
        assert labels["present"][row].sum() == len(masks)
        assert labels["extents"][row].tolist() == data.labels.extents[e].tolist()
    assert labels["points"].shape[2:] == (2, 2)
    decoded = batch["decoded"].tolist()
    assert len(set(decoded)) == 5 and max(decoded) < len(chosen)
    for row, embedding in zip(decoded, batch["embeddings"], strict=True):
        image = data.labels.image[chosen[[row]]]
        assert torch.equal(embedding, data.embeddings[image]["embedding"][0].float())


def test_a_batch_smaller_than_the_number_of_masks(data, monkeypatch):
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 1)
    batch = Batches(data, data.of(["D_sem"]), 3, seed=0)(0)
    assert batch["decoded"].tolist() == [0] and len(batch["embeddings"]) == 1


def test_shares_of_a_batch_are_the_batch(data, monkeypatch):
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 5)
    whole = Batches(data, data.of(DATASETS), 3, seed=2)(7)
    shares = [Batches(data, data.of(DATASETS), 3, seed=2, shares=3)(3 * 7 + share) for share in range(3)]
    for name, tensor in whole["labels"].items():
        rows = torch.cat([share["labels"][name] for share in shares]).flatten(1).tolist()
        assert sorted(rows) == sorted(tensor.flatten(1).tolist()), name
    assert sum(len(share["embeddings"]) for share in shares) == len(whole["embeddings"])


def test_more_shares_than_images(data):
    with pytest.raises(WrisError, match="a batch of 10 images cannot be cut into 11 shares; start fewer processes"):
        Batches(data, data.of(DATASETS), 3, seed=0, shares=11)


# -------------------------------------------------------------------------------------------------------- the loss


WEIGHTS = LossWeights(dice=0.7, mask=1.3, points=4.0, labels=0.9, score=0.6)


def entropy(logit: np.ndarray, target: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-np.asarray(logit, dtype=np.float64)))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p))


def signs(logits: np.ndarray) -> np.ndarray:
    """Labels of one prompt's points: 1 for a logit above 0, and for the highest."""
    return ((logits > 0) | (logits == logits.max())).astype(np.int64)


def trusted(decoded: SamMasks) -> Tensor:
    """Of the only prompt the mask with the highest predicted IoU."""
    return decoded.logits[0, decoded.iou[0].argmax()]


def box_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of the boxes around two sets of points."""
    boxes = [np.concatenate([points.min(axis=0), points.max(axis=0)]) for points in (first, second)]
    width, height = np.minimum(boxes[0][2:], boxes[1][2:]) - np.maximum(boxes[0][:2], boxes[1][:2])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (sum(np.prod(box[2:] - box[:2]) for box in boxes) - shared)


def slow_loss(generator: PointGenerator, segmenter: Segmenter, batch: dict, weights: LossWeights) -> dict[str, float]:
    """Eq. 4, an expression, a query and a candidate at a time, with all orders of points and queries tried out."""
    inputs, labels = batch["inputs"], {name: value.numpy() for name, value in batch["labels"].items()}
    side = segmenter.sam.image_encoder.img_size
    found = {"points": [], "labels": [], "dice": [], "mask": [], "score": []}
    decoded = dict(zip(batch["decoded"].tolist(), batch["embeddings"], strict=True))
    with torch.no_grad():
        prompts = generator(**inputs)
    for e in range(len(inputs["image"])):
        points, logits, scores = (x[e].numpy() for x in vars(prompts).values())
        pairs = {}
        for k in range(len(points)):
            for y in np.flatnonzero(labels["present"][e]):
                orders = []
                for order in map(list, permutations(range(points.shape[1]))):
                    l1 = np.abs(points[k] - labels["points"][e, y, order]).sum(axis=1).mean()
                    bce = entropy(logits[k], labels["point_labels"][e, y, order]).mean()
                    orders.append((weights.points * l1 + weights.labels * bce, l1, bce))
                cost, l1, bce = min(orders)
                pairs[k, y] = cost, l1, bce  # the score is left out
        present = np.flatnonzero(labels["present"][e])
        best = min(
            (list(zip(queries, present, strict=True)) for queries in permutations(range(len(points)), len(present))),
            key=lambda chosen: sum(pairs[pair][0] for pair in chosen),
        )
        targets = np.zeros(len(points))
        for k, y in best:
            found["points"].append(pairs[k, y][1])
            found["labels"].append(pairs[k, y][2])
            targets[k] = labels["scores"][e, y]
            if e in decoded and labels["scores"][e, y] == 1:
                width, height = labels["extents"][e] * side
                image = SamImage(decoded[e][None], (side, side), (side, side))
                pixels = points[k] * np.array([width, height], dtype=np.float32)
                asked = torch.from_numpy(pixels)[None], torch.from_numpy(signs(logits[k]))[None]
                with torch.no_grad():
                    mask = trusted(segmenter.decode(image, *asked)).double().numpy()
                p, given = 1 / (1 + np.exp(-mask)), labels["masks"][e, y]
                found["dice"].append(1 - (2 * (p * given).sum() + 1) / (p.sum() + given.sum() + 1))
                found["mask"].append(entropy(mask, given).mean())
        referent = labels["masks"][e, labels["scores"][e].argmax()]
        drawn = labels["points"][e, labels["scores"][e].argmax()]
        for k in range(len(points) * generator.config.anchored):  # those are right, too, that cover the referent
            cells = (points[k] * labels["extents"][e] * len(referent)).astype(int).clip(0, len(referent) - 1)
            positive = cells[signs(logits[k]) == 1]
            hit = referent[positive[:, 1], positive[:, 0]].mean() > 0.5
            if labels["scores"][e].any() and hit and box_overlap(points[k], drawn) > 0.5:
                targets[k] = 1
        found["score"].append(entropy(scores, targets).mean())
    return {name: float(np.mean(values)) for name, values in found.items() if values}


@pytest.fixture
def batch(data, monkeypatch) -> dict:
    """Of all datasets, with H_ref's referents selected, and square and other images."""
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 6)
    monkeypatch.setattr(training, "EXPRESSIONS_PER_IMAGE", 3)
    monkeypatch.setattr(training, "MASKS_PER_STEP", 7)
    known = data.with_referents(np.maximum(data.labels.referent, 0))
    batches = Batches(known, data.of(DATASETS), CONFIG.points, seed=0)
    return next(batch for batch in map(batches, range(50)) if len(batch["labels"]["extents"].unique(dim=0)) == 3)


def spread(generator: PointGenerator) -> PointGenerator:
    """Predictions that differ: an untrained generator's hardly do."""
    with torch.no_grad():
        for head in (generator.point_head, generator.score_head):
            head[-1].weight *= 6
    return generator


@pytest.mark.parametrize(("masks", "anchored"), [(True, True), (False, True), (True, False)])
def test_the_loss_equals_a_slow_computation(batch, segmenter, masks, anchored):
    generator = spread(tiny_generator(anchored=anchored))
    weights = WEIGHTS if masks else LossWeights(dice=0.0, mask=0.0, points=4.0, labels=0.9, score=0.6)
    terms = training_loss(segmenter, weights, blend=False)(generator, batch, 0)
    expected = slow_loss(generator, segmenter, batch, weights)
    names = {"points", "labels", "score"} | ({"dice", "mask"} if masks else set())
    assert set(terms) == names | {"loss"}
    for name in names:
        assert terms[name].item() == pytest.approx(expected[name], rel=1e-3), name
    total = sum(getattr(weights, name) * expected[name] for name in names)
    assert terms["loss"].item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("masks", [1, 7])
def test_shares_have_the_batchs_loss_and_gradient(data, segmenter, monkeypatch, masks):
    """With one mask a batch, all shares but one have none."""
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 5)
    monkeypatch.setattr(training, "MASKS_PER_STEP", masks)
    known = data.with_referents(np.maximum(data.labels.referent, 0))
    loss, found = training_loss(segmenter, WEIGHTS, blend=False), []
    for shares in (1, 3):
        generator, sums = spread(tiny_generator()), {}
        batches = Batches(known, data.of(DATASETS), CONFIG.points, seed=4, shares=shares)
        for share in range(shares):
            terms = loss(generator, batches(share), 0)
            (terms["loss"] / shares).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.item() / shares
        found.append((sums, [p.grad for p in generator.parameters()]))
    (one, gradients), (three, others) = found
    assert three == pytest.approx(one, rel=1e-5) and min(one.values()) > 0
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-3)


def test_without_mask_terms_sam_is_not_asked(batch, monkeypatch):
    monkeypatch.setattr(training, "prompt_sam", None)
    torch.manual_seed(0)
    unused = Segmenter(build_toy_sam(64))
    training_loss(unused, LossWeights(), False)(tiny_generator(), batch, 0)["loss"].backward()


@pytest.mark.parametrize("blend", [False, True])
def test_gradients_reach_the_generator_and_not_sam(batch, segmenter, blend):
    generator = spread(tiny_generator())
    training_loss(segmenter, WEIGHTS, blend)(generator, batch, 0)["loss"].backward()
    assert [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None and not p.requires_grad for p in segmenter.sam.parameters())
    # Of the mask alone: points learn from it, labels only where they are blended.
    generator.zero_grad()
    only_masks = LossWeights(dice=1.0, mask=1.0, points=0.0, labels=0.0, score=0.0)
    training_loss(segmenter, only_masks, blend)(generator, batch, 0)["loss"].backward()
    x, y, r = generator.point_head[-1].weight.grad.unflatten(0, (-1, 3)).unbind(1)
    assert x.any() and y.any() and bool(r.any()) == blend


def test_a_generator_starts_from_its_seed_and_whitens_what_it_will_see(data):
    before = torch.random.get_rng_state()
    first, again, other = (start(CONFIG, seed, data).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    same = {name for name, value in first.items() if torch.equal(value, other[name])}
    assert {name for name in same if "whiten" in name} == {name for name in first if "whiten" in name}
    assert not torch.equal(first["point_head.0.weight"], other["point_head.0.weight"])
    # There are fewer images and expressions than it looks at, so it has seen them all.
    for number, features in enumerate(data.patches[np.arange(len(data.patches))].values()):
        tokens = torch.nn.functional.layer_norm(features.float().flatten(2).transpose(1, 2), features.shape[1:2])
        torch.testing.assert_close(first[f"whiten_visual.{number}.mean"], tokens.mean((0, 1)), atol=1e-4, rtol=1e-4)
    words = data.words[np.arange(len(data.words))]
    mean = words["words"].float()[words["words mask"]].mean(0)
    torch.testing.assert_close(first["whiten_words.mean"], mean, atol=1e-4, rtol=1e-4)


def test_a_generator_learns_from_the_batches(data, segmenter, monkeypatch):
    monkeypatch.setattr(training, "IMAGES_PER_STEP", 4)
    monkeypatch.setattr(training, "MASKS_PER_STEP", 1)
    chosen = data.of(["H_sem", "D_sem"])
    batches, generator = Batches(data, chosen, CONFIG.points, seed=0), tiny_generator()
    loss = training_loss(segmenter, LossWeights(dice=1.0, mask=1.0), blend=False)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    losses = []
    for number in range(40):
        terms = loss(generator, batches(number), number)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
