"""Matching against brute force, and every term of Eq. 4 against loops and logarithms."""

from dataclasses import asdict, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wris_lib.backbones.sam import Segmenter, build_toy_sam
from wris_lib.errors import WrisError
from wris_lib.methods.ppt.loss import (
    LossWeights,
    Matches,
    PseudoLabels,
    boxes_around,
    mask_terms,
    match,
    matched_loss,
    pair_terms,
    points_inside,
)
from wris_lib.methods.ppt.prompts import PointPrompts, prompt_sam

WEIGHTS = LossWeights(dice=0.7, mask=1.3, points=4.0, labels=0.9, score=0.6)
E, K, Y, M, SIDE = 3, 4, 2, 3, 5


def sample(seed: int = 0) -> tuple[PointPrompts, PseudoLabels, Tensor]:
    """Prompts, pseudo-labels (two, one, none) and masks of all queries, in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompts = PointPrompts(normal(E, K, M, 2).sigmoid(), 2 * normal(E, K, M), 2 * normal(E, K))
    labels = PseudoLabels(
        points=normal(E, Y, M, 2).sigmoid(),
        point_labels=(normal(E, Y, M) > 0).double(),
        scores=torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]).double(),
        present=torch.tensor([[True, True], [False, True], [False, False]]),
        masks=normal(E, Y, SIDE, SIDE).sigmoid(),
    )
    return prompts, labels, 3 * normal(E, K, SIDE, SIDE)


def entropy(logit: float, target: float) -> float:
    p = 1 / (1 + np.exp(-float(logit)))
    return -(target * np.log(p) + (1 - target) * np.log(1 - p))


def slow_pair(prompts: PointPrompts, labels: PseudoLabels, masks: Tensor, e: int, k: int, y: int) -> dict[str, float]:
    """The terms of one pair; the points in the best of all M! orders."""
    found = []
    for order in permutations(range(M)):
        offsets = (prompts.points[e, k] - labels.points[e, y, list(order)]).abs().numpy()
        l1 = np.mean([dx + dy for dx, dy in offsets])
        bce = np.mean(
            [
                entropy(r, t)
                for r, t in zip(prompts.label_logits[e, k], labels.point_labels[e, y, list(order)], strict=True)
            ]
        )
        found.append((WEIGHTS.points * l1 + WEIGHTS.labels * bce, l1, bce))
    _, l1, bce = min(found)
    pixels = [(x.item(), t.item()) for x, t in zip(masks[e, k].flatten(), labels.masks[e, y].flatten(), strict=True)]
    p = [1 / (1 + np.exp(-x)) for x, _ in pixels]
    both, total = sum(a * t for a, (_, t) in zip(p, pixels, strict=True)), sum(p) + sum(t for _, t in pixels)
    return {
        "points": l1,
        "labels": bce,
        "score": entropy(prompts.score_logits[e, k], labels.scores[e, y].item()),
        "dice": 1 - (2 * both + 1) / (total + 1),
        "mask": np.mean([entropy(x, t) for x, t in pixels]),
    }


def present_pairs(labels: PseudoLabels) -> list[tuple[int, int, int]]:
    return [(e, k, y) for e, y in labels.present.nonzero().tolist() for k in range(K)]


@pytest.mark.parametrize("seed", range(3))
def test_terms_of_every_pair(seed):
    prompts, labels, masks = sample(seed)
    terms = pair_terms(prompts, labels, WEIGHTS, masks)
    assert terms.keys() == asdict(WEIGHTS).keys()
    for e, k, y in present_pairs(labels):
        expected = slow_pair(prompts, labels, masks, e, k, y)
        assert {name: term[e, k, y].item() for name, term in terms.items()} == pytest.approx(expected)
    without = pair_terms(prompts, labels, WEIGHTS)
    assert without.keys() == {"points", "labels", "score"}
    assert all(torch.equal(without[name], terms[name]) for name in without)


@settings(max_examples=15)
@given(st.permutations(range(M)), st.permutations(range(M)))
def test_points_are_sets(ours, theirs):
    prompts, labels, _ = sample()
    shuffled = PointPrompts(prompts.points[:, :, ours], prompts.label_logits[:, :, ours], prompts.score_logits)
    drawn = replace(labels, points=labels.points[:, :, theirs], point_labels=labels.point_labels[:, :, theirs])
    before, after = pair_terms(prompts, labels, WEIGHTS), pair_terms(shuffled, drawn, WEIGHTS)
    for e, k, y in present_pairs(labels):
        assert all(before[name][e, k, y].item() == pytest.approx(after[name][e, k, y].item()) for name in before)


def test_points_spread_over_the_box_and_know_their_places():
    """Drawn anew each step from a box whose left half is the object. In a fixed order all would meet in the middle."""
    torch.manual_seed(0)
    places, logits = (torch.randn(shape, requires_grad=True) for shape in ((1, 1, 6, 2), (1, 1, 6)))
    score, weights = torch.zeros(1, 1), LossWeights()
    optimizer = torch.optim.Adam([places, logits], lr=0.05)
    for _ in range(200):
        drawn = 0.2 + 0.6 * torch.rand(1, 1, 6, 2)
        on_object = (drawn[..., 0] < 0.5).float()
        labels = PseudoLabels(drawn, on_object, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
        prompts = PointPrompts(places.sigmoid(), logits, score)
        terms = pair_terms(prompts, labels, weights)
        loss = matched_loss(prompts, labels, terms, match(terms, labels.present, weights), weights)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = places.sigmoid().detach()[0, 0]
    assert ((points > 0.2) & (points < 0.8)).all()
    assert (points.std(dim=0) > 0.08).all()  # 0.17 for points drawn there
    clear = (points[:, 0] - 0.5).abs() > 0.05
    assert clear.sum() >= 4 and torch.equal(logits.detach()[0, 0][clear] > 0, points[clear, 0] < 0.5)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_matching_is_the_best_of_all(seed, present):
    generator = torch.Generator().manual_seed(seed)
    terms = {name: torch.randn(len(present), K, 3, generator=generator) for name in ("points", "labels", "score")}
    found = match(terms, torch.tensor(present), WEIGHTS)
    cost = sum(getattr(WEIGHTS, name) * terms[name] for name in ("points", "labels"))  # the score is left out
    for e, here in enumerate(present):
        columns = [y for y in range(3) if here[y]]
        mine = found.expression == e
        assert sorted(found.label[mine].tolist()) == columns
        assert len(set(found.query[mine].tolist())) == len(columns)
        chosen = sum(cost[e, k, y].item() for k, y in zip(found.query[mine], found.label[mine], strict=True))
        everything = [
            sum(cost[e, k, y].item() for k, y in zip(queries, columns, strict=True))
            for queries in permutations(range(K), len(columns))
        ]
        assert chosen == pytest.approx(min(everything), abs=1e-5)


@pytest.mark.parametrize("with_masks", ["none", "some", "matched", "all"])
def test_loss_is_that_of_the_matched_pairs(with_masks):
    prompts, labels, masks = sample()
    terms = pair_terms(prompts, labels, WEIGHTS, masks if with_masks == "all" else None)
    matches = match(terms, labels.present, WEIGHTS)
    decoded = {"some": torch.tensor([2, 0]), "matched": torch.arange(3)}.get(with_masks)
    asked = None if decoded is None else masks[matches.expression, matches.query][decoded]
    partly = decoded if with_masks == "some" else None
    found = matched_loss(prompts, labels, terms, matches, WEIGHTS, asked, decoded=partly)
    pairs = list(zip(*(column.tolist() for column in vars(matches).values()), strict=True))
    assert sorted([e, y] for e, _, y in pairs) == labels.present.nonzero().tolist()
    rows = [slow_pair(prompts, labels, masks, *pair) for pair in pairs]
    used = [name for name in asdict(WEIGHTS) if with_masks != "none" or name not in ("dice", "mask")]
    expected = {name: np.mean([row[name] for row in rows]) for name in used}
    if with_masks == "some":  # the other terms are of all three pairs
        expected |= {name: np.mean([rows[pair][name] for pair in (2, 0)]) for name in ("dice", "mask")}
    partner = {(e, k): labels.scores[e, y].item() for e, k, y in pairs}
    expected["score"] = np.mean(
        [entropy(prompts.score_logits[e, k], partner.get((e, k), 0.0)) for e in range(E) for k in range(K)]
    )
    expected["loss"] = sum(getattr(WEIGHTS, name) * expected[name] for name in used)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_masks_can_change_the_partner():
    prompts, labels, _ = sample()
    masks = torch.full((E, K, SIDE, SIDE), -9.0, dtype=torch.float64)
    for k in range(K):  # whichever query has the right mask is chosen when masks count enough
        good = masks.clone()
        good[1, k] = 9.0 * (2 * labels.masks[1, 1].round() - 1)
        weights = replace(WEIGHTS, dice=1000.0)
        matches = match(pair_terms(prompts, labels, weights, good), labels.present, weights)
        assert matches.query[matches.expression == 1].tolist() == [k]


def test_no_pseudo_label_at_all():
    prompts, labels, _ = sample()
    labels = replace(labels, present=torch.zeros_like(labels.present))
    terms = pair_terms(prompts, labels, WEIGHTS)
    matches = match(terms, labels.present, WEIGHTS)
    assert matches.query.shape == (0,)
    found = matched_loss(prompts, labels, terms, matches, WEIGHTS, torch.zeros(0, SIDE, SIDE).double())
    assert found["points"] == found["labels"] == found["dice"] == found["mask"] == 0
    assert found["loss"].item() == pytest.approx(
        WEIGHTS.score * torch.nn.functional.softplus(prompts.score_logits).mean()
    )


# ---------------------------------------------------------------------------------------------- who counts as right


@pytest.fixture
def hits() -> tuple[PointPrompts, PseudoLabels]:
    """One expression; an image twice as wide as high: the referent in its left half, another object in the right."""
    left, right = [0.1, 0.5], [0.9, 0.5]
    points = torch.tensor([[[left, left, right], [left, right, right], [right, left, right], [right, left, left]]])
    logits = torch.full((1, 4, 3), 5.0)
    logits[0, 2] = torch.tensor([-6.0, -4.0, -5.0])  # none is above 0: the highest counts, alone
    logits[0, 3, 0] = -5.0
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :4, :4] = masks[0, 1, :4, 4:] = 1.0  # the lower half of SAM's square is padding
    labels = PseudoLabels(
        torch.zeros(1, 2, 3, 2),
        torch.zeros(1, 2, 3),
        torch.tensor([[1.0, 0.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        masks,
        torch.tensor([[1.0, 0.5]]),
    )
    return PointPrompts(points, logits, torch.zeros(1, 4)), labels


def test_share_of_positive_points_inside(hits):
    prompts, labels = hits
    expected = torch.tensor([[[2 / 3, 1 / 3], [1 / 3, 2 / 3], [1, 0], [1, 0]]])
    torch.testing.assert_close(points_inside(prompts, labels), expected)
    labels = replace(labels, present=torch.tensor([[False, True]]))
    torch.testing.assert_close(points_inside(prompts, labels), expected * torch.tensor([0.0, 1.0]))
    edges = PointPrompts(torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]]), torch.ones(1, 1, 2), torch.zeros(1, 1))
    everywhere = replace(labels, masks=torch.ones(1, 2, 8, 8), extents=None)
    assert points_inside(edges, everywhere).tolist() == [[[0.0, 1.0]]]


def corners(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [left, bottom], [right, bottom]]


def test_boxes_around_points():
    points = torch.tensor([[corners(0, 0, 0.4, 0.5), corners(0.3, 0.3, 0.3, 0.3)]])
    assert torch.equal(boxes_around(points), torch.tensor([[[0, 0, 0.4, 0.5], [0.3, 0.3, 0.3, 0.3]]]))


def test_all_that_cover_the_referent_can_count_as_right():
    """The referent is the left half of the image, and its points spread over it."""
    queries = [
        corners(0.05, 0.1, 0.45, 0.95),  # over it
        corners(0.1, 0.1, 0.2, 0.2),  # on a part of it
        corners(0.0, 0.0, 0.1, 0.1),  # on a part of it, but nobody else answers for it
        corners(0.1, 0.1, 0.9, 0.9),  # over everything
    ]
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :, :4] = masks[0, 1, :, 4:] = 1.0
    given = torch.tensor([[corners(0, 0, 0.5, 1), corners(0.5, 0, 1, 1)]])
    labels = PseudoLabels(
        given, torch.ones(1, 2, 4), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), masks
    )
    prompts = PointPrompts(torch.tensor([queries]), torch.ones(1, 4, 4), torch.tensor([[0.3, -0.2, 0.9, -1.1]]))
    matches = Matches(torch.tensor([0, 0]), torch.tensor([3, 2]), torch.tensor([1, 0]))  # query 2 has the referent
    terms = pair_terms(prompts, labels, WEIGHTS)
    for all_right, targets in ((False, [0, 0, 1, 0]), (True, [1, 0, 1, 0])):
        found = matched_loss(prompts, labels, terms, matches, WEIGHTS, all_right=all_right)
        expected = np.mean([entropy(c, t) for c, t in zip(prompts.score_logits[0], targets, strict=True)])
        assert found["score"].item() == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("all_right", [False, True])
def test_gradients_are_those_of_finite_differences(all_right):
    prompts, labels, masks = sample(1)
    leaves = [*vars(prompts).values(), masks]
    matches = match(pair_terms(prompts, labels, WEIGHTS, masks), labels.present, WEIGHTS)

    def loss(*leaves: Tensor) -> Tensor:
        here = PointPrompts(*leaves[:3])
        terms = pair_terms(here, labels, WEIGHTS)
        matched = leaves[3][matches.expression, matches.query]
        return matched_loss(here, labels, terms, matches, WEIGHTS, matched, all_right)["loss"]

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


def test_queries_without_a_partner_learn_their_score_only():
    prompts, labels, masks = sample()
    leaves = [leaf.requires_grad_() for leaf in (*vars(prompts).values(), masks)]
    terms = pair_terms(prompts, labels, WEIGHTS, masks)
    matches = match(terms, labels.present, WEIGHTS)
    matched_loss(prompts, labels, terms, matches, WEIGHTS)["loss"].backward()
    partner = torch.zeros(E, K, dtype=torch.bool)
    partner[matches.expression, matches.query] = True
    for leaf in (leaves[0], leaves[1], leaves[3]):
        assert torch.equal(leaf.grad.flatten(2).any(dim=2), partner)
    assert (leaves[2].grad != 0).all()


def test_masks_teach_points_through_sam():
    """The mask's terms alone move a point to where SAM's mask is more like the wanted one."""
    torch.manual_seed(0)
    segmenter, embedding, square = Segmenter(build_toy_sam(128)), torch.randn(1, 96, 16, 16), torch.ones(1, 2)
    logits = torch.tensor([[[2.0, -2.0]]])
    wanted = prompt_sam(segmenter, embedding, torch.tensor([[[0.2, 0.3], [0.8, 0.7]]]), logits[0], square)
    points = torch.tensor([[[[0.25, 0.35], [0.7, 0.75]]]], requires_grad=True)
    labels = PseudoLabels(
        points.detach(),
        torch.ones(1, 1, 2),
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        wanted.logits[:, :1].sigmoid().round(),
    )
    only_masks = LossWeights(dice=1.0, mask=1.0, points=0.0, labels=0.0, score=0.0)

    def loss(points: Tensor) -> Tensor:
        prompts = PointPrompts(points, logits, torch.zeros(1, 1))
        terms = pair_terms(prompts, labels, only_masks)
        matches = match(terms, labels.present, only_masks)
        rows = (matches.expression, matches.query)
        masks = prompt_sam(segmenter, embedding, points[rows], logits[rows], square).logits[:, 0]
        return matched_loss(prompts, labels, terms, matches, only_masks, masks)["loss"]

    before = loss(points)
    before.backward()
    step = 1e-3 * points.grad / points.grad.norm()
    with torch.no_grad():
        measured = (loss(points + step) - loss(points - step)).item()
        assert measured == pytest.approx(2 * (points.grad * step).sum().item(), rel=0.05)
        assert loss(points - 5 * step) < before


def test_half_precision_is_not_used_for_sums_over_pixels():
    prompts, labels, masks = sample()
    logits, given = masks.float().flatten(2), labels.masks.float().flatten(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mask_terms(logits.bfloat16().float(), given)
    outside = mask_terms(logits.bfloat16().float(), given)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


# ------------------------------------------------------------------------------------------------------- user errors


def test_more_pseudo_labels_than_queries():
    prompts, labels, _ = sample()
    few = PointPrompts(prompts.points[:, :1], prompts.label_logits[:, :1], prompts.score_logits[:, :1])
    with pytest.raises(WrisError, match="an expression has 2 pseudo-labels, but the generator has only 1 queries"):
        match(pair_terms(few, labels, WEIGHTS), labels.present, WEIGHTS)


@pytest.mark.parametrize("name", ["points", "label_logits"])
def test_predictions_that_are_not_numbers(name):
    prompts, labels, _ = sample()
    broken = replace(prompts, **{name: getattr(prompts, name) * torch.nan})
    with pytest.raises(WrisError, match="no longer finite numbers; train with a lower learning rate or in fp32"):
        match(pair_terms(broken, labels, WEIGHTS), labels.present, WEIGHTS)


def test_masks_that_are_not_there():
    prompts, labels, masks = sample()
    terms = pair_terms(prompts, labels, WEIGHTS)
    matches, bare = match(terms, labels.present, WEIGHTS), replace(labels, masks=None)
    for use in ({"all_right": True}, {"mask_logits": masks[matches.expression, matches.query]}):
        with pytest.raises(WrisError, match="came without masks, but the loss was asked to use them"):
            matched_loss(prompts, bare, terms, matches, WEIGHTS, **use)
    with pytest.raises(WrisError, match="came without masks, but the loss was asked to use them"):
        pair_terms(prompts, bare, WEIGHTS, masks)
