"""From tokens' maps to one: against the equations, written as loops over heads, tokens and patches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wris_lib.errors import WrisError
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS, aggregate, local_maps, min_max
from wris_lib.methods.iterprime.words import Pieces

HEADS, TOKENS, PATCHES = 3, 9, 12
PRIMARIES = ([4], [4, 5], [2, 5, 6])
CONTEXTS = ([], [3], [1, 3, 7])


def random_maps(seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Attention that sums to less than 1 over patches, and a gradient of both signs."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(HEADS, tokens, PATCHES + 1, generator=generator).softmax(dim=-1)[..., 1:]
    return attention, torch.randn(HEADS, tokens, PATCHES, generator=generator)


def pieces_with(primary: list[int], context: list[int]) -> Pieces:
    return Pieces(sorted(primary + context), primary)


def slow_local(a: np.ndarray, g: np.ndarray, primary: list[int], context: list[int]) -> np.ndarray:
    """H_l [heads, context tokens or 1, patches], of a gradient that is not negative."""
    heads, _, patches = a.shape
    found = np.zeros((heads, max(len(context), 1), patches))
    for head in range(heads):
        for patch in range(patches):
            a_m = sum(a[head, token, patch] for token in primary) / len(primary)
            g_m = sum(g[head, token, patch] for token in primary) / len(primary)
            apart = [a_m - a[head, token, patch] for token in context] or [a_m - 0]
            length = sum(each**2 for each in apart) ** 0.5
            for row, each in enumerate(apart):
                found[head, row, patch] = each / (length or 1e-8) * g_m * (a_m * g_m)
    return found


def slow_aggregate(attention: Tensor, gradient: Tensor, pieces: Pieces, how: str) -> np.ndarray:
    a, g = attention.double().numpy(), gradient.double().numpy().copy()
    g[g < 0] = 0
    heads, tokens, patches = a.shape
    everything, effective, primary = list(range(tokens)), pieces.effective, pieces.primary
    context = [token for token in effective if token not in primary]
    if how == "mean" or not effective:
        listed, local = everything, False
    elif how == "gvlp" or not primary:
        listed, local = effective, False
    else:
        often = [token for _ in effective for token in primary]
        listed = {"local": [], "global": effective + often, "pwem": [0] + effective + often}[how]
        local = how != "global"
    total = np.zeros(patches)
    for head in range(heads):
        rows = [a[head, token] * g[head, token] for token in listed]
        if local:
            rows += list(slow_local(a, g, primary, context)[head])
        total += sum(rows) / len(rows) / heads
    if total.max() == total.min():
        return np.zeros(patches)
    return (total - total.min()) / (total.max() - total.min())


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("primary", PRIMARIES, ids=len)
@pytest.mark.parametrize("context", CONTEXTS, ids=len)
def test_aggregations_equal_the_equations(how, primary, context):
    """Primary words of one, two and three pieces with 0, 1 and 3 others; a piece may come before or after them."""
    pieces = pieces_with(primary, context)
    for seed in range(3):
        attention, gradient = random_maps(seed)
        found = aggregate(attention, gradient, pieces, how)
        np.testing.assert_allclose(found, slow_aggregate(attention, gradient, pieces, how), atol=1e-5)
        assert found.dtype == torch.float32 and found.shape == (PATCHES,)


def test_primary_word_emphasis_is_the_default():
    attention, gradient = random_maps()
    pieces = pieces_with([4], [2, 3])
    assert torch.equal(aggregate(attention, gradient, pieces), aggregate(attention, gradient, pieces, "pwem"))


def test_aggregations_differ():
    attention, gradient = random_maps()
    maps = torch.stack([aggregate(attention, gradient, pieces_with([4, 5], [1, 7]), how) for how in AGGREGATIONS])
    assert (torch.cdist(maps, maps) + torch.eye(len(maps))).min() > 1e-2


@pytest.mark.parametrize("primary", PRIMARIES, ids=len)
@pytest.mark.parametrize("context", CONTEXTS, ids=len)
def test_local_maps_equal_the_equations(primary, context):
    attention, gradient = random_maps(5)
    found = local_maps(attention, gradient.relu(), pieces_with(primary, context))
    expected = slow_local(attention.double().numpy(), gradient.relu().double().numpy(), primary, context)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.shape[1] == max(len(context), 1)
    assert bool(context) == bool((found < 0).any())  # signed, but without context nothing is subtracted


def test_with_one_context_word_the_difference_is_a_sign():
    attention, gradient = random_maps(6)
    own, worth = attention[:, 4], gradient.relu()[:, 4]
    expected = torch.sign(own - attention[:, 3]) * worth * own * worth
    torch.testing.assert_close(local_maps(attention, gradient.relu(), pieces_with([4], [3]))[:, 0], expected)


@pytest.mark.parametrize("how", ["local", "global", "pwem"])
def test_without_a_primary_word_it_is_the_mean_of_the_effective_ones(how):
    attention, gradient = random_maps()
    nouns, nothing = Pieces([2, 6], []), Pieces([], [])
    assert torch.equal(aggregate(attention, gradient, nouns, how), aggregate(attention, gradient, nouns, "gvlp"))
    expected = slow_aggregate(attention, gradient, nothing, "mean")
    for each in (how, "gvlp"):
        np.testing.assert_allclose(aggregate(attention, gradient, nothing, each), expected, atol=1e-5)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("context", CONTEXTS, ids=len)
def test_nothing_gives_an_all_zero_map(how, context):
    """Nowhere attended to, nowhere a positive gradient, or everywhere the same."""
    attention, gradient = random_maps()
    pieces = pieces_with([4, 5], context)
    for a, g in (
        (attention, -gradient.abs()),
        (torch.zeros_like(attention), gradient),
        (torch.full_like(attention, 0.05), torch.ones_like(gradient)),
    ):
        found = aggregate(a, g, pieces, how)
        assert torch.equal(found, torch.zeros(PATCHES))


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_negative_gradient_counts_as_none(how):
    attention, gradient = random_maps()
    pieces = pieces_with([4, 5], [1, 7])
    assert torch.equal(
        aggregate(attention, gradient, pieces, how), aggregate(attention, gradient.clamp(min=0), pieces, how)
    )
    assert not torch.allclose(
        aggregate(attention, gradient, pieces, how), aggregate(attention, gradient.abs(), pieces, how), atol=1e-3
    )


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_words_that_look_at_the_same_patches(how):
    """A tie everywhere: the local maps are 0 then, not 0 / 0."""
    attention, gradient = random_maps()
    attention[:, 3] = attention[:, 4]
    pieces = pieces_with([4], [3])
    assert torch.equal(local_maps(attention, gradient.relu(), pieces), torch.zeros(HEADS, 1, PATCHES))
    found = aggregate(attention, gradient, pieces, how)
    np.testing.assert_allclose(found, slow_aggregate(attention, gradient, pieces, how), atol=1e-5)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_left_at_once(how, dtype):
    attention, gradient = (each.to(dtype) for each in random_maps())
    pieces = pieces_with([4, 5], [1, 7])
    found = aggregate(attention, gradient, pieces, how)
    assert found.dtype == torch.float32
    assert torch.equal(found, aggregate(attention.float(), gradient.float(), pieces, how))


@given(st.integers(0, 10_000), st.sampled_from(AGGREGATIONS), st.sampled_from(PRIMARIES), st.sampled_from(CONTEXTS))
def test_maps_reach_from_0_to_1_and_move_with_the_patches(seed, how, primary, context):
    attention, gradient = random_maps(seed)
    pieces = pieces_with(primary, context)
    found = aggregate(attention, gradient, pieces, how)
    assert found.min() == 0 and found.max() == 1
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(seed))
    moved = aggregate(attention[..., order], gradient[..., order], pieces, how)
    torch.testing.assert_close(moved, found[order], atol=1e-5, rtol=0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9))
def test_min_max(values):
    found, low, high = min_max(torch.tensor(values)).tolist(), min(values), max(values)
    if high == low:
        assert found == [0.0] * len(values)
    elif high - low > 1e-30:
        np.testing.assert_allclose(found, [(each - low) / (high - low) for each in values], atol=1e-5)
        assert min(found) == 0 and max(found) == 1


def test_maps_are_scaled_each_by_itself():
    maps = torch.tensor([[0.0, 5.0, 10.0], [-1.0, 1.0, 0.0], [3.0, 3.0, 3.0]])
    assert torch.equal(min_max(maps), torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))


def test_an_unknown_aggregation():
    with pytest.raises(WrisError, match="no aggregation 'best'; choose one of: mean, gvlp, local, global, pwem"):
        aggregate(*random_maps(), pieces_with([4], []), "best")
