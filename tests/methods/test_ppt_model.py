"""The point generator against a slow computation of one expression at a time, and SAM behind it."""

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import build_model_from_openai_state_dict
from segment_anything import sam_model_registry
from torch import Tensor, nn

from tests.random_stack import noise
from wris_lib.backbones.clip import Clip
from wris_lib.backbones.sam import SamImage, Segmenter, build_toy_sam, decode_prompts
from wris_lib.errors import WrisError
from wris_lib.methods.ppt.config import PAPER, GeneratorConfig
from wris_lib.methods.ppt.layers import (
    Groups,
    Reading,
    Whitening,
    cell_centres,
    cell_shares,
    encode_positions,
)
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.prompts import PointPrompts, best_logits, point_labels, prompt_sam

VARIANTS = [{"anchored": anchored, "fuse_vision": fuse} for anchored in (True, False) for fuse in (True, False)]
SIZES = {"queries": 4, "points": 3, "fusion_width": 8, "fusion_heads": 2, "width": 12, "heads": 3, "feedforward": 10}


def tiny(**variant: bool) -> PointGenerator:
    torch.manual_seed(0)
    generator = PointGenerator(GeneratorConfig((1, 2, "surgery"), (6, 5, 7), 10, **SIZES, **variant))
    for whitening in (*generator.whiten_visual, generator.whiten_words):
        whitening.fit(torch.randn(50, len(whitening.mean)) * torch.rand(len(whitening.mean)) + 0.3)
    return generator


def inputs(image: list[int], lengths: list[int], seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Features of three stages, unlike in scale, of max(image) + 1 images, 2 rows by 4 columns; words; directions."""
    torch.manual_seed(seed)
    visual = [torch.randn(max(image) + 1, c, 2, 4) * scale for c, scale in ((6, 9.0), (5, 3.0), (7, 0.1))]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return visual, torch.randn(len(image), max(lengths), 10), mask, torch.tensor(image), torch.randn(len(image), 7)


# ------------------------------------------------------------------------------------------------ a slow computation


def slow_attention(attention: nn.Module, queries: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, head by head: n d, m c, h n m -> n d."""
    q, (k, v) = attention.query(queries), attention.memory(memory).chunk(2, dim=-1)
    size = q.shape[-1] // attention.heads
    heads = [slice(h * size, (h + 1) * size) for h in range(attention.heads)]
    bias = [0] * attention.heads if bias is None else bias
    seen = [
        torch.softmax(q[:, h] @ k[:, h].T / size**0.5 + b, dim=-1) @ v[:, h] for h, b in zip(heads, bias, strict=True)
    ]
    return attention.out(torch.cat(seen, dim=-1))


def slow_positions(points: np.ndarray) -> Tensor:
    """sin, cos(2^(5i/15) π x), then y, as the docstring says: half a wave to 16 waves."""
    waves = np.pi * 2 ** (np.arange(16) / 3)
    angles = np.concatenate([points[:, :1] * waves, points[:, 1:] * waves], axis=1)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


def slow_tokens(features: Tensor, whitening: Whitening) -> Tensor:
    """c h w -> n c+64."""
    _, height, width = features.shape
    rows = []
    for y in range(height):
        for x in range(width):
            value = features[:, y, x]
            value = (value - value.mean()) / (value.var(unbiased=False) + 1e-5).sqrt()
            value = (value - whitening.mean) @ whitening.matrix
            rows.append(torch.cat([value, slow_positions(np.array([[(x + 0.5) / width, (y + 0.5) / height]]))[0]]))
    return torch.stack(rows)


def slow_sample(image: Tensor, point: Tensor) -> Tensor:
    """The value at (x, y) of an image of 2 rows and 4 columns, h·w c, between its four nearest cells."""
    column = (point[0].item() * 4 - 0.5, 3)
    row = (point[1].item() * 2 - 0.5, 1)
    (left, x), (top, y) = ((min(int(max(p, 0)), last - 1), p) for p, last in (column, row))
    x, y = (min(max(p - low, 0), 1) for p, low in ((x, left), (y, top)))
    corners = {(0, 0): (1 - x) * (1 - y), (1, 0): x * (1 - y), (0, 1): (1 - x) * y, (1, 1): x * y}
    return sum(weight * image[4 * (top + b) + left + a] for (a, b), weight in corners.items())


def slow_reading(layer: Reading, queries: Tensor, words: Tensor) -> Tensor:
    """Q of `Reading`."""
    if layer.anchored:
        scale, shift = layer.film(words[-1]).chunk(2)
        queries = queries * (1 + scale) + shift
    queries = layer.read_norm(queries + slow_attention(layer.read, queries, words))
    if layer.anchored:
        queries = layer.compare_norm(queries + slow_attention(layer.compare, queries, queries))
    return layer.feedforward_norm(queries + layer.feedforward(queries))


def slow_review(model: PointGenerator, queries: Tensor, images: list[Tensor], points: Tensor, r: Tensor, words: Tensor):
    """Q of `Review`, a query and a point at a time."""
    review, rows = model.review, []
    for query, places, labels in zip(queries, points, r, strict=True):
        weights = labels.sigmoid() / labels.sigmoid().sum()
        pairs = list(zip(review.see, images, strict=True))
        seen = sum(w * sum(see(slow_sample(i, p)) for see, i in pairs) for w, p in zip(weights, places, strict=True))
        low, high = places.min(dim=0).values, places.max(dim=0).values
        where = [slow_positions(np.array([each.tolist()]))[0] for each in ((low + high) / 2, high - low)]
        rows.append(review.take_norm(query + review.take(seen) + review.place(torch.cat(where))))
    return slow_reading(review.reading, torch.stack(rows), words)


def slow_generator(
    model: PointGenerator, visual: list[Tensor], words: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts of one expression about one image, without padding: V' and T' in full, equation by equation."""
    config = model.config
    side = int(config.queries**0.5)
    anchors = np.array([[(x + 0.5) / side, (y + 0.5) / side] for y in range(side) for x in range(side)])
    queries = model.embed_anchors(slow_positions(anchors)) if config.anchored else model.queries
    centres = np.array([[(x + 0.5) / 4, (y + 0.5) / 2] for y in range(2) for x in range(4)])
    squares = torch.from_numpy(((anchors[:, None] - centres) ** 2).sum(-1)).float()
    if config.anchored:
        # Over 2 rows of 4 columns each of 2×2 cells has two patches: one row, two columns.
        surgery = (visual[-1] * direction[:, None, None]).sum(0)
        cells = [surgery[row, 2 * a : 2 * a + 2] for row in range(2) for a in range(2)]
        pooled = torch.stack([torch.stack([cell.max(), cell.mean()]) for cell in cells])  # K 2
        pooled = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
        queries = queries + model.embed_similarity(pooled)
    words, images = (words - model.whiten_words.mean) @ model.whiten_words.matrix, []
    for n, (features, stage) in enumerate(zip(visual, model.stages, strict=True)):
        fusion, image = stage.fusion, slow_tokens(features, model.whiten_visual[n])
        images.append(image)
        v, t = fusion.visual_in(image), fusion.words_in(words)
        if n > 0:
            v, t = fusion.visual_norm(v + last_v), fusion.words_norm(t + last_t)  # noqa: F821
        last_v, last_t = v, t  # noqa: F841
        text = words + fusion.words_out(t * slow_attention(fusion.words_attention, t, v))
        fused = image
        if config.fuse_vision:
            fused = image + fusion.visual_out(v * slow_attention(fusion.visual_attention, v, t))
        if config.anchored:
            # Over 2 rows of 4 columns, an anchor of 2×2 lies in the middle of a row and between two columns.
            local = [image[[4 * row + 2 * a, 4 * row + 2 * a + 1]].mean(dim=0) for row in range(2) for a in range(2)]
            queries = queries + stage.local(torch.stack(local))
        nearness = None  # the logarithm of a Gaussian around the anchor
        if config.anchored:
            nearness = [-squares / (2 * reach**2) for reach in stage.log_reach.exp()]
        queries = stage.look_norm(queries + slow_attention(stage.look, queries, fused, nearness))
        queries = slow_reading(stage.reading, queries, text)
    raw = model.point_head(queries).view(config.queries, config.points, 3)
    x, y, r = raw.unbind(-1)
    if config.anchored:
        logit = torch.from_numpy(np.log(anchors / (1 - anchors))).float()
        x, y = x + logit[:, :1], y + logit[:, 1:]
    points = torch.stack([x, y], dim=-1).sigmoid()
    if config.anchored:
        queries = slow_review(model, queries, images, points, r, words)
    return points, r, model.score_head(queries)[:, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_slow_computation_of_each_expression_alone(variant):
    model = tiny(**variant)
    image, lengths = [2, 0, 2, 2, 0], [3, 5, 1, 4, 5]  # image 1 has no expression, image 2 has three
    visual, words, mask, index, directions = inputs(image, lengths)
    prompts = model(visual, words, mask, index, directions)
    assert isinstance(prompts, PointPrompts)
    for e, (b, length) in enumerate(zip(image, lengths, strict=True)):
        seen = [features[b] for features in visual]
        points, labels, scores = slow_generator(model, seen, words[e, :length], directions[e])
        torch.testing.assert_close(prompts.points[e], points, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(prompts.label_logits[e], labels, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(prompts.score_logits[e], scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_trained(variant):
    model = tiny(**variant)
    prompts = model(*inputs([0, 1, 1], [4, 2, 3]))
    (
        prompts.points.square().sum() + prompts.label_logits.square().sum() + prompts.score_logits.square().sum()
    ).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    whitening = sum(c * c + c for c in (6, 5, 7, 10))  # is kept with the weights, and not trained
    assert model.trainable_parameters == sum(value.numel() for value in model.state_dict().values()) - whitening


def test_half_precision_does_not_round_places():
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        prompts = model(*inputs([0, 0], [4, 2]))
    assert prompts.points.dtype == prompts.label_logits.dtype == prompts.score_logits.dtype == torch.float32
    assert not torch.equal(prompts.points, prompts.points.bfloat16().float())


def test_whitening_against_numpy():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) * [100, 10, 1, 0.1, 0] + [3, 0, -8, 0, 1]
    whitening = Whitening(5).double()
    torch.testing.assert_close(whitening(torch.from_numpy(features)), torch.from_numpy(features))  # not fitted yet
    whitening.fit(torch.from_numpy(features), floor=0.01)
    white = whitening(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    values, vectors = np.linalg.eigh(np.cov(features.T, bias=True))
    expected = vectors @ np.diag(values / (values + 0.01 * values.mean())) @ vectors.T
    np.testing.assert_allclose(np.cov(white.T, bias=True), expected, atol=1e-9)
    assert not whitening.mean.requires_grad and not whitening.matrix.requires_grad


def test_heads_reach_from_near_to_far():
    reach = tiny(anchored=True).stages[0].log_reach.exp()
    torch.testing.assert_close(reach, torch.tensor([0.08, 0.08**0.5, 1.0]))


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_groups_bring_every_expression_to_its_image_and_back(image):
    groups = Groups(torch.tensor(image), 4)
    x = torch.arange(1, 1 + len(image) * 6).view(len(image), 3, 2).float()
    packed = groups.pack(x)
    most = max(image.count(b) for b in range(4))
    assert packed.shape == (4, most * 3, 2)
    for b in range(4):
        mine = x[[e for e, of in enumerate(image) if of == b]].flatten(0, 1)
        assert torch.equal(packed[b, : len(mine)], mine) and not packed[b, len(mine) :].any()
    assert torch.equal(groups.unpack(packed), x)


def test_cells_are_counted_row_by_row():
    expected = [[1 / 6, 0.25], [0.5, 0.25], [5 / 6, 0.25], [1 / 6, 0.75], [0.5, 0.75], [5 / 6, 0.75]]
    torch.testing.assert_close(cell_centres(2, 3), torch.tensor(expected))


def test_positions_tell_all_cells_of_a_fine_grid_apart():
    codes = encode_positions(cell_centres(32, 32))
    nearest = torch.cdist(codes, codes).fill_diagonal_(torch.inf).min()
    assert nearest > 0.5


def test_shares_of_cells_are_bilinear_and_constant_beyond_the_outermost_centres():
    points = torch.tensor([[0.3, 0.4], [0.71, 0.55], [0.0, 1.0]])
    seen = cell_shares(points[:, None], torch.ones(3, 1), 4, 8) @ cell_centres(4, 8)
    torch.testing.assert_close(seen, torch.tensor([[0.3, 0.4], [0.71, 0.55], [1 / 16, 7 / 8]]))


def test_points_see_together_what_each_sees_by_its_share():
    image = torch.randn(8, 3)
    points, shares = torch.rand(5, 2), torch.rand(5)
    each = [share * slow_sample(image, point) for point, share in zip(points, shares, strict=True)]
    torch.testing.assert_close(cell_shares(points, shares, 2, 4) @ image, sum(each))


def test_points_learn_nothing_from_the_review():
    model = tiny(anchored=True)
    prompts = model(*inputs([0], [3]))
    prompts.score_logits[0, 0].backward()
    assert all(parameter.grad is None for parameter in model.point_head.parameters())
    assert model.review.place.weight.grad.any()


def test_anchored_points_start_at_their_anchors():
    model = tiny(anchored=True)
    nn.init.zeros_(model.point_head[-1].weight)
    nn.init.zeros_(model.point_head[-1].bias)
    prompts = model(*inputs([0], [3]))
    corners = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    torch.testing.assert_close(prompts.points[0], corners[:, None].expand(4, 3, 2))


@pytest.mark.parametrize("anchored", [True, False])
def test_left_and_right_can_be_learned(anchored):
    """From an image that is the same everywhere: only the positions can tell."""
    model = tiny(anchored=anchored)
    visual = [torch.ones(1, c, 4, 4) * torch.randn(1, c, 1, 1) for c in (6, 5, 7)]
    words, mask = torch.randn(2, 3, 10), torch.ones(2, 3, dtype=torch.bool)
    image, side = torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 1.0])
    directions = torch.randn(2, 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(50):
        prompts = model(visual, words, mask, image, directions)
        middle = prompts.points.detach()[..., 0].mean(dim=2)
        right = 1 - (middle - side[:, None]).abs()  # a score for being on the side that was asked for
        error = (prompts.points[..., 0] - side[:, None, None]).abs().mean() if not anchored else 0
        loss = error + nn.functional.binary_cross_entropy_with_logits(prompts.score_logits, right.round())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompts = model(visual, words, mask, image, directions)
    best = prompts.score_logits.argmax(dim=1)
    x = prompts.points[torch.arange(2), best, :, 0].mean(dim=1)
    assert x[0] < 0.5 < x[1]


def test_sizes_that_do_not_go_together():
    with pytest.raises(WrisError, match="10 anchored queries do not fill a square grid"):
        GeneratorConfig(("surgery",), (6,), 10, queries=10)
    with pytest.raises(WrisError, match="the last stage must be 'surgery', not 2"):
        GeneratorConfig(("surgery", 2), (6, 6), 10)
    GeneratorConfig((1,), (6,), 10, queries=10, anchored=False)
    with pytest.raises(WrisError, match="widths must be multiples of their heads: 30 of 4, 64 of 8"):
        GeneratorConfig(("surgery",), (6,), 10, width=30)


# ------------------------------------------------------------------------------------------------------------- SAM


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(build_toy_sam(128))


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of two images; two prompts of three points; their label logits."""
    torch.manual_seed(1)
    return torch.randn(2, 96, 16, 16), torch.rand(2, 3, 2), torch.tensor([[3.0, -1.0, 0.4], [-2.0, 0.1, -0.3]])


def test_of_every_prompt_a_point_is_positive():
    logits = [[[0.4, -1.0, 2.0], [-3.0, -0.5, -2.0]], [[0.0, -1e-6, -2.0], [-1.0, 1e-6, 0.0]]]
    expected = [[[1, 0, 1], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]]]
    assert point_labels(torch.tensor(logits)).tolist() == expected


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_labels_follow_the_logits(logits):
    for row, labels in zip(logits, point_labels(torch.tensor(logits)).tolist(), strict=True):
        assert labels == [int(logit > 0 or logit == max(row)) for logit in row]
        assert any(labels)


def test_masks_are_those_of_the_segmenter(segmenter, prompts):
    """A wide image and a high one: their padding is what `extents` says. A prompt whose points are all negative."""
    embeddings, points, _ = prompts
    logits, labels = torch.tensor([[3.0, -1.0, 0.4], [-2.0, -0.1, -0.3]]), torch.tensor([[1, 0, 1], [0, 1, 0]])
    side = segmenter.sam.image_encoder.img_size
    wide, high = (side // 2, side), (side, side // 2)
    images = [SamImage(embeddings[:1], (60, 120), wide), SamImage(embeddings[1:], (120, 60), high)]
    sizes, extents = torch.tensor([[120.0, 60.0], [60.0, 120.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    masks = prompt_sam(segmenter, embeddings, points, logits, extents)
    answers = best_logits(masks)
    assert masks.logits.shape == (2, 4, 64, 64) and masks.iou.shape == (2, 4) and answers.shape == (2, 64, 64)
    for i, image in enumerate(images):
        pixels, asked = points[i : i + 1] * sizes[i], labels[i : i + 1]
        single = segmenter.decode(image, pixels, asked, multimask=False)
        three = segmenter.decode(image, pixels, asked)
        torch.testing.assert_close(masks.logits[i], torch.cat([single.logits, three.logits], 1)[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(masks.iou[i], torch.cat([single.iou, three.iou], 1)[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(answers[i], three.logits[0, three.iou[0].argmax()], atol=1e-4, rtol=0)


def test_blended_labels_mix_the_embeddings(segmenter, prompts):
    embeddings, points, logits = prompts
    square, sam = torch.ones(1, 2), segmenter.sam
    pixels = points * sam.image_encoder.img_size
    blended = prompt_sam(segmenter, embeddings, points, logits, square, blend=True)
    codes = [
        sam.prompt_encoder(points=(pixels, torch.full((2, 3), label)), boxes=None, masks=None)[0] for label in (0, 1)
    ]
    r = nn.functional.pad(logits.sigmoid(), (0, 1))[..., None]
    with pytest.MonkeyPatch.context() as patch:  # SAM's own decoding, but of the mixture
        dense = sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(2, -1, 16, 16)
        patch.setattr(sam.prompt_encoder, "forward", lambda **_: (r * codes[1] + (1 - r) * codes[0], dense))
        expected, _ = decode_prompts(sam, embeddings, points, (logits > 0).long(), None)
    torch.testing.assert_close(blended.logits, expected, atol=1e-4, rtol=0)
    certain = prompt_sam(segmenter, embeddings, points, 100 * logits, square, blend=True)
    chosen = prompt_sam(segmenter, embeddings, points, logits, square)
    torch.testing.assert_close(certain.logits, chosen.logits, atol=1e-4, rtol=0)
    assert not torch.allclose(blended.logits, chosen.logits, atol=1e-2)


@pytest.mark.parametrize("blend", [False, True])
def test_sams_gradients_are_those_of_finite_differences(segmenter, prompts, blend):
    embeddings, points, logits = prompts
    points.requires_grad_()
    logits.requires_grad_()

    def objective(points: Tensor, logits: Tensor) -> Tensor:
        masks = prompt_sam(segmenter, embeddings, points, logits, torch.tensor([[1.0, 0.75]]), blend)
        return masks.logits.double().square().mean()

    objective(points, logits).backward()
    assert all(parameter.grad is None for parameter in segmenter.sam.parameters())
    torch.manual_seed(2)
    step = 2e-3 * torch.randn_like(points)  # less than a pixel
    with torch.no_grad():
        measured = (objective(points + step, logits) - objective(points - step, logits)).item()
    assert measured == pytest.approx(2 * (points.grad * step).sum().item(), rel=0.05, abs=1e-6)
    assert points.grad.abs().sum() > 0
    if not blend:
        assert logits.grad is None  # a label that is chosen has no gradient
        return
    step = 0.05 * torch.randn_like(logits)
    with torch.no_grad():
        measured = (objective(points, logits + step) - objective(points, logits - step)).item()
    assert measured == pytest.approx(2 * (logits.grad * step).sum().item(), rel=0.05, abs=1e-6)
    assert logits.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------- in full size


def test_the_papers_size_from_image_and_words_to_gradients():
    """CLIP ViT-B/16 and SAM ViT-B's decoder, in full size and filled with noise; 20.7 million are trained."""
    shapes = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
    tokenizer = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    clip = Clip(build_model_from_openai_state_dict(noise(shapes)).float(), tokenizer, dense_size=224, device="cpu")
    with torch.no_grad():
        visual = clip.patch_features(torch.randn(1, 3, 224, 224), PAPER.stages)
        words, mask = clip.word_features(["the man in the green shirt", "a dog"])
    with torch.device("meta"):  # the image encoder stays there
        sam = sam_model_registry["vit_b"]()
    for part in (sam.prompt_encoder, sam.mask_decoder):
        part.load_state_dict(noise(part), assign=True)

    model = PointGenerator(PAPER)
    assert model.trainable_parameters == pytest.approx(20.7e6, rel=0.03)
    directions = clip.text_features(["the man in the green shirt", "a dog"]) - clip.text_features([""])
    prompts = model(visual, words, mask, torch.zeros(2, dtype=torch.long), directions)
    prompts.points.retain_grad()
    assert prompts.points.shape == (2, PAPER.queries, PAPER.points, 2)
    best = prompts.score_logits.argmax(dim=1)
    points, labels = prompts.points[[0, 1], best], prompts.label_logits[[0, 1], best]
    masks = prompt_sam(Segmenter(sam), torch.randn(1, 256, 64, 64), points, labels, torch.tensor([[1.0, 0.75]]))
    assert masks.logits.shape == (2, 4, 256, 256)
    masks.logits[:, 0].mean().backward()
    assert all(prompts.points.grad[e, k].any() for e, k in enumerate(best))
    assert model.stages[0].fusion.visual_in.weight.grad.any()
