import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wris_lib.errors import WrisError
from wris_lib.methods.pcnet.loss import (
    ambiguity,
    classification,
    disambiguation,
    disambiguation_as_written,
    peak,
    region_shrinking,
    region_shrinking_as_written,
    soft_iou,
)


def slow_classification(scores: np.ndarray) -> float:
    """Number by number, as the docstring says it."""
    size = len(scores)
    total = 0.0
    for i in range(size):
        for j in range(size):
            own = scores[i, j]
            shares = [
                math.exp(own[p]) / (sum(math.exp(scores[i, t][p]) for t in range(size)) + math.e)
                for p in range(len(own))
            ]
            m = sum(shares) / len(shares)
            y = sum(own) / len(own) + max(own) + (1 - m) ** 3 * math.log(0.01 + m)
            right = 1 / (1 + math.exp(-y))
            total -= math.log(right if i == j else 1 - right)
    return total / size**2


def test_classification_equals_a_slow_computation():
    scores = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(classification(scores).item(), slow_classification(scores.numpy()))
    double = scores.requires_grad_()
    assert torch.autograd.gradcheck(classification, (double,))


def test_classification_rewards_the_right_text():
    right = torch.full((2, 2, 4), -3.0)
    right[0, 0, 1] = right[1, 1, 2] = 3.0
    assert classification(right) < classification(right.flip(0))


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(WrisError, match="a batch of one image has no wrong texts"):
        classification(torch.zeros(1, 1, 4))


def slow_iou(response: np.ndarray, mask: np.ndarray) -> float:
    both = sum(float(r) for r, m in zip(response, mask, strict=True) if m)
    union = sum(max(float(r), 0) + float(m) - float(r) * float(m) for r, m in zip(response, mask, strict=True))
    return both / union if union else 0.0


def test_ambiguity_equals_a_slow_computation():
    rng = np.random.default_rng(0)
    for _ in range(20):
        response, proposals = rng.random(12), rng.random((4, 12)) < 0.4
        present = np.array([True, True, rng.random() < 0.5, False])
        shown = [number for number in range(4) if present[number]]
        first = max(shown, key=lambda number: (max(response * proposals[number]), -number))
        others = [proposals[number] for number in shown if number != first]
        expected = 1 - (slow_iou(response, proposals[first]) - slow_iou(response, np.any(others, axis=0)))
        given = (torch.from_numpy(x)[None] for x in (response, proposals, present))
        assert ambiguity(*given).item() == pytest.approx(expected)


def test_ambiguity_by_hand():
    left, right = [True, True, False, False], [False, False, True, True]
    proposals, present = torch.tensor([[left, right]]), torch.tensor([[True, True]])
    assert ambiguity(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), proposals, present) == 0
    assert ambiguity(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), proposals, present) == 1
    only = torch.tensor([[True, False]])
    assert ambiguity(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), proposals, only) == 1  # it misses the only proposal


def test_without_proposals_nothing_is_known():
    response = torch.rand(2, 6, requires_grad=True)
    found = ambiguity(response, torch.ones(2, 3, 6, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    assert found.tolist() == [1, 1]


@given(st.integers(0, 10_000))
def test_ambiguity_lies_between_0_and_2(seed):
    generator = torch.Generator().manual_seed(seed)
    response = torch.rand(3, 9, generator=generator)
    proposals = torch.rand(3, 4, 9, generator=generator) < 0.3
    found = ambiguity(response, proposals, torch.rand(3, 4, generator=generator) < 0.7)
    assert ((found >= 0) & (found <= 2)).all()


def test_soft_iou_of_masks_is_iou():
    a, b = torch.tensor([1.0, 1, 0, 0]), torch.tensor([False, True, True, False])
    assert soft_iou(a, b) == pytest.approx(1 / 3)
    assert soft_iou(torch.zeros(4), torch.zeros(4, dtype=torch.bool)) == 0


def test_doubt_pulls_the_response_onto_one_proposal():
    left, right = [True, True, False, False], [False, False, True, True]
    response = torch.tensor([[0.9, 0.8, 0.5, 0.4]], requires_grad=True)
    ambiguity(response, torch.tensor([[left, right]]), torch.tensor([[True, True]])).sum().backward()
    assert (response.grad[0, :2] < 0).all() and (response.grad[0, 2:] > 0).all()


# ------------------------------------------------------------------------------------------------------- L_RaS, ours


def test_region_shrinking_by_hand():
    doubts = [torch.tensor([1.0, 0.2]), torch.tensor([0.4, 0.5]), torch.tensor([0.6, 0.5])]
    assert region_shrinking(doubts) == pytest.approx(((0 + 0.8) / 2 + (0.7 + 0.5) / 2) / 2)
    assert region_shrinking(doubts, margin=0.1) == pytest.approx(((0 + 0.4) / 2 + (0.3 + 0.1) / 2) / 2)
    assert region_shrinking(doubts[:1]) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_region_shrinking_is_zero_where_doubt_shrinks_by_more_than_the_margin(steps):
    """And without a margin it is the paper's."""
    shrinking = 10 - torch.tensor([0.51 + step for step in steps]).cumsum(dim=0)
    assert region_shrinking([doubt[None] for doubt in shrinking]) == 0
    doubts = [torch.tensor([step]) for step in steps]
    assert region_shrinking(doubts, margin=0.0) == region_shrinking_as_written(doubts)


def test_an_earlier_stage_does_not_get_worse_so_that_the_next_looks_better():
    doubts = torch.tensor([[0.9, 0.2], [0.8, 0.5], [0.7, 0.6]], requires_grad=True)
    (slope,) = torch.autograd.grad(region_shrinking([*doubts]), doubts)
    assert not slope[0].any() and (slope[1:] > 0).all()
    (slope,) = torch.autograd.grad(region_shrinking_as_written([*doubts]), doubts)
    assert slope[0, 1] < 0  # what the paper's does


# ------------------------------------------------------------------------------------------------------- L_IaD, ours


def slow_disambiguation(own: np.ndarray, others: np.ndarray) -> float:
    def spread(scores: np.ndarray) -> np.ndarray:
        return np.exp(3 * scores) / np.exp(3 * scores).sum()

    found = []
    for scores, rest in zip(own, others, strict=True):
        for other in rest:
            a, b = spread(scores), spread(other)
            found.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return float(np.mean(found))


def maps(images: int = 4, others: int = 2, cells: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    own, rest = (torch.randn(*shape, cells, generator=generator) for shape in ((images,), (images, others)))
    return own.double().requires_grad_(), rest.double()


def test_disambiguation_equals_a_slow_computation():
    own, others = maps()
    found = disambiguation(own, others)
    assert found.item() == pytest.approx(slow_disambiguation(own.detach().numpy(), others.numpy()))
    assert torch.autograd.gradcheck(disambiguation, (own, others.requires_grad_()))


@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_disambiguation_lies_between_0_and_1_and_knows_no_level(seed, level):
    generator = torch.Generator().manual_seed(seed)
    own, others = (6 * torch.rand(*shape, 5, generator=generator).double() for shape in ((3,), (3, 2)))
    found = disambiguation(own, others)
    assert 0 <= found <= 1 + 1e-9
    torch.testing.assert_close(disambiguation(own + level, others), found)
    torch.testing.assert_close(disambiguation(own, others + level), found)


def test_disambiguation_of_equal_maps_is_1():
    own, _ = maps()
    assert disambiguation(own, own[:, None] + 3).item() == pytest.approx(1)


def test_far_apart_nothing_is_left_to_be_learnt():
    """Other than with the paper's peaks, which go on lowering the map where the other has its peak."""
    own = torch.tensor([[4.0, 3.0, 0.0, -4.0]], requires_grad=True)
    near, far = torch.tensor([[[3.0, 2.5, 0.0, 0.0]]]), torch.tensor([[[-4.0, 0.0, 0.0, 4.0]]])
    slopes = [torch.autograd.grad(disambiguation(own, other), own)[0].abs().max() for other in (near, far)]
    assert slopes[0] > 1e-3 and slopes[1] < 1e-6
    assert torch.autograd.grad(disambiguation_as_written(own, far), own)[0].abs().max() > 1


def test_disambiguation_separates_two_texts_and_keeps_the_level():
    scores = torch.zeros(2, 6)
    scores[:, 2] = 1.0
    scores[1, 4] = 0.9
    scores.requires_grad_()
    before = disambiguation(scores[:1], scores[None, 1:]).item()
    optimizer = torch.optim.SGD([scores], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        disambiguation(scores[:1], scores[None, 1:]).backward()
        optimizer.step()
    assert disambiguation(scores[:1], scores[None, 1:]) < 0.1 < 0.5 < before
    assert scores[0].argmax() == 2 and scores[1].argmax() == 4
    assert scores.sum(dim=1).tolist() == pytest.approx([1.0, 1.9], abs=1e-4)


@pytest.mark.parametrize("loss", [disambiguation, disambiguation_as_written])
def test_no_image_with_two_referents_costs_nothing(loss):
    own, others = torch.zeros(0, 6, requires_grad=True), torch.zeros(0, 1, 6)
    found = loss(own, others)
    found.backward()
    assert found == 0 and own.grad.shape == (0, 6)


# -------------------------------------------------------------------------------------------- as the paper has them


def test_region_shrinking_as_written_counts_growth_only():
    doubts = [torch.tensor([1.0, 0.2]), torch.tensor([0.4, 0.5]), torch.tensor([0.6, 0.5])]
    assert region_shrinking_as_written(doubts) == pytest.approx(((0 + 0.3) / 2 + (0.2 + 0) / 2) / 2)
    assert region_shrinking_as_written(doubts[:1]) == 0


@given(st.lists(st.floats(0, 2), min_size=1, max_size=5))
def test_region_shrinking_as_written_is_zero_for_a_shrinking_sequence(values):
    shrinking = [torch.tensor([value]) for value in sorted(values, reverse=True)]
    assert region_shrinking_as_written(shrinking) == 0


def test_a_peak_is_one_hot_and_passes_gradients_on():
    scores = torch.tensor([[0.2, 3.0, -1.0]], requires_grad=True)
    found = peak(scores)
    assert found.tolist() == [[0, 1, 0]]
    (found * torch.tensor([[5.0, 7.0, 9.0]])).sum().backward()
    assert scores.grad.tolist() == [[5, 7, 9]]


def test_disambiguation_as_written_has_the_paper_s_value_and_a_gradient_where_peaks_coincide():
    torch.manual_seed(0)
    own, others = torch.randn(20, 4, requires_grad=True), torch.randn(20, 2, 4)
    paper = (1 - (peak(own)[:, None] - peak(others)).square().sum(dim=-1)).mean()
    assert disambiguation_as_written(own, others).item() == pytest.approx(paper.item())
    coincide = peak(own)[:, None] @ peak(others).transpose(1, 2)  # image × 1 × other
    (slope,) = torch.autograd.grad((1 - (peak(own) - peak(others[:, 0])).square().sum(dim=-1)).sum(), own)
    met = coincide[:, 0, 0] > 0
    assert met.any() and not slope[met].any()
    (slope,) = torch.autograd.grad(disambiguation_as_written(own, others[:, :1]), own)
    assert (slope[met] > 0).any(dim=1).all()


def test_disambiguation_as_written_by_hand():
    own = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    apart, same = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[9.0, 0.0, 0.0]])
    assert disambiguation_as_written(own, torch.stack([apart, apart])) == pytest.approx((-1 + 1) / 2)
    assert disambiguation_as_written(own[:1], torch.stack([torch.cat([apart, torch.tensor([[0.0, 1.0, 0.0]])])])) == 0
    assert disambiguation_as_written(own[1:], same[None]) == 1


def test_disambiguation_as_written_separates_two_texts():
    scores = torch.zeros(2, 6)
    scores[:, 2] = 1.0
    scores[1, 4] = 0.9
    scores.requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = disambiguation_as_written(scores[:1], scores[None, 1:])
        loss.backward()
        optimizer.step()
    assert disambiguation_as_written(scores[:1], scores[None, 1:]) == -1
