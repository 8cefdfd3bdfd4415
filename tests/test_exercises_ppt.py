"""The exercises of notebook 02: other right answers, ways that are not enough, and what the library does."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from tests.wrong_answers import EXERCISES, rejection
from wris_lib.methods.ppt.labels import draw_points
from wris_lib.methods.ppt.loss import LossWeights, match

DRAW_POINTS, FOOL, MATCH = (EXERCISES[name] for name in ("draw_points", "fool", "match"))


def in_turn(costs):
    chosen = []
    for label in range(costs.shape[1]):
        free = [query for query in range(len(costs)) if query not in chosen]
        chosen.append(min(free, key=lambda query: costs[query, label]))
    return [(query, label) for label, query in enumerate(chosen)]


def cheapest_first(costs):
    costs, pairs = costs.copy(), []
    for _ in range(costs.shape[1]):
        query, label = np.unravel_index(costs.argmin(), costs.shape)
        pairs.append((query, label))
        costs[query], costs[:, label] = np.inf, np.inf
    return pairs


def slow_match(costs):
    from itertools import permutations

    queries, labels = costs.shape
    orders = permutations(range(queries), labels) if queries < 8 else [linear_sum_assignment(costs.T)[1]]
    best = min(orders, key=lambda order: sum(costs[query, label] for label, query in enumerate(order)))
    return {(query, label) for label, query in enumerate(best)}


@pytest.mark.parametrize(
    "answer",
    [slow_match, lambda costs: np.array(MATCH.answer()(costs)), lambda costs: MATCH.answer()(costs)[::-1]],
)
def test_other_right_ways_to_match_pass(answer, capsys):
    assert MATCH.judge(answer) is True


def test_a_list_of_true_and_false_will_do_as_labels(capsys):
    assert DRAW_POINTS.judge(DRAW_POINTS.answer({".astype(float)\n": ".tolist()\n"})) is True


@pytest.mark.parametrize("costs", [[[1, 2], [3, 9]], [[40, 90], [0, 5], [1, 30]]])
def test_costs_that_fool_the_cheapest_pair_first(costs, capsys):
    assert FOOL.judge(lambda: costs) is True


@pytest.mark.parametrize(
    "answer, hint",
    [
        (in_turn, "costs 0.90; [(0, 1), (1, 0)] costs 0.40: one pseudo-label after the other is not enough"),
        (cheapest_first, "costs 1.00; [(0, 0), (1, 1)] costs 0.50: the cheapest pair first is not enough"),
    ],
)
def test_greedy_ways_to_match(answer, hint, capsys):
    assert hint in rejection("match", answer, capsys)


def test_the_exercises_are_what_the_library_does():
    mask = np.zeros((9, 14), bool)
    mask[2:6, 3:11] = mask[6:8, 5:7] = True
    points, labels = DRAW_POINTS.answer()(mask, 50, np.random.default_rng(4))
    theirs, their_labels = draw_points(mask, 50, np.random.default_rng(4))
    np.testing.assert_allclose(points, theirs, rtol=1e-6)
    np.testing.assert_array_equal(labels, their_labels)
    costs = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    found = match({"points": torch.from_numpy(costs)[None]}, torch.ones(1, 3, dtype=torch.bool), LossWeights())
    assert sorted(MATCH.answer()(costs)) == sorted(zip(found.query.tolist(), found.label.tolist(), strict=True))
