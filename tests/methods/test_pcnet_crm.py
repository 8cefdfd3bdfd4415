"""The referring module against its equations, an image at a time, and what it does before it has learnt anything."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wris_lib.errors import WrisError
from wris_lib.methods.pcnet.crm import MODULATIONS, Crm, CrmConfig, response_maps

CHANNELS = 6


def model(**changes: object) -> Crm:
    return Crm(CrmConfig(CHANNELS, **changes))


def perturbed(crm: Crm, seed: int = 0) -> Crm:
    """Identities and zeros would hide most of the equations."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in crm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return crm


def inputs(images: int = 2, texts: int = 3, tokens: int = 7, cues: int = 4) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(1)
    sentences = torch.randn(images, texts, CHANNELS)
    visual = torch.randn(images, tokens, CHANNELS)
    return visual, sentences, [torch.randn(images, texts, CHANNELS) for _ in range(cues)]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if layer.bias is None else layer.bias.detach().numpy()
    return x @ layer.weight.detach().numpy().T + bias


def adapt(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    return unit(x + linear(layer.change, x))


def attend(layer: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rows, y = [], unit(y)
    for row in unit(x):
        alike = np.array([linear(layer.query, row) @ linear(layer.key, other) for other in y]) / np.sqrt(len(row))
        weights = np.exp(alike - alike.max())
        rows.append(weights / weights.sum() @ linear(layer.value, y))
    return np.stack(rows)


def mlp(layers: nn.Module, x: np.ndarray) -> np.ndarray:
    return linear(layers.narrow, np.maximum(linear(layers.widen, x), 0))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_equals_the_equations_image_by_image(modulation):
    crm = perturbed(model(modulation=modulation, stages=3, temperature=2.5)).double()
    visual, sentences, cues = inputs()
    maps = crm(visual.double(), sentences.double(), [cue.double() for cue in cues])
    assert len(maps) == 3
    for b in range(len(visual)):
        v, q = adapt(crm.visual_in, visual[b].double().numpy()), adapt(crm.text_in, sentences[b].double().numpy())
        for stage, cue, found in zip(crm.stages, cues, maps, strict=False):
            c = adapt(crm.text_in, cue[b].double().numpy())
            if modulation.startswith("VTA"):
                c = c + mlp(stage.image_mlp, attend(stage.ask_image, c, v))
            q = q + (mlp(stage.cues_mlp, attend(stage.ask_cues, q, c)) if modulation.endswith("TTA") else c)
            v = v + attend(stage.ask_sentences, v, q)
            np.testing.assert_allclose(found[b].detach().numpy(), 2.5 * unit(q) @ unit(v).T, atol=1e-9)


def test_without_stages_sentences_are_compared_with_the_image_as_they_are():
    visual, sentences, _ = inputs()
    for crm in (model(stages=0), perturbed(model(stages=0))):
        (found,) = crm(visual, sentences, [])
        v, q = adapt(crm.visual_in, visual[0].numpy()), adapt(crm.text_in, sentences[0].numpy())
        np.testing.assert_allclose(found[0].detach().numpy(), 6 * q @ v.T, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- at the start


def test_it_starts_in_the_space_of_clip():
    """Cosines, whatever lengths come in; every cue is added to the sentence."""
    visual, sentences, cues = inputs()
    (found,) = model(stages=0)(3 * visual, sentences, [])
    v, q = unit(visual.numpy()), unit(sentences.numpy())
    np.testing.assert_allclose(found.detach().numpy(), 6 * q @ v.transpose(0, 2, 1), atol=1e-5)
    for cue, found in zip(cues, model(modulation="ADD", stages=3)(visual, 5 * sentences, cues), strict=False):
        q = q + unit(cue.numpy())
        np.testing.assert_allclose(found.detach().numpy(), 6 * unit(q) @ v.transpose(0, 2, 1), atol=1e-5)


def same(first: list[Tensor], second: list[Tensor], atol: float = 1e-5) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_a_sentence_alone_starts_by_adding_its_cue():
    alone = inputs(texts=1)
    same(model(modulation="TTA")(*alone), model(modulation="ADD")(*alone))


def test_attention_finds_a_sentences_own_cue_among_others():
    visual, *_ = inputs()
    sentences = torch.eye(CHANNELS)[:3].expand(2, -1, -1)
    cues = [2 * sentences, sentences]
    same(model(modulation="TTA")(visual, sentences, cues), model(modulation="ADD")(visual, sentences, cues), 1e-3)


@pytest.mark.parametrize("modulation", ["ADD", "TTA"])
def test_asking_the_image_starts_silent(modulation):
    same(model(modulation=f"VTA+{modulation}")(*inputs()), model(modulation=modulation)(*inputs()))


# --------------------------------------------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_everything_is_trained(modulation):
    crm = perturbed(model(modulation=modulation))
    torch.cat(crm(*inputs()), dim=1).square().sum().backward()
    assert [name for name, p in crm.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_nothing_stays_at_its_start(modulation):
    """Zeros block the gradient of what is in front of them, but only once."""
    crm, before = model(modulation=modulation), model(modulation=modulation).state_dict()
    optimizer = torch.optim.Adam(crm.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cat(crm(*inputs()), dim=1).square().sum().backward()
        optimizer.step()
    assert [name for name, tensor in crm.state_dict().items() if torch.equal(tensor, before[name])] == []


# ---------------------------------------------------------------------------------------------- who is seen by whom


def test_cues_change_what_is_seen_and_only_those_that_are_read():
    crm, (visual, sentences, cues) = perturbed(model(modulation="VTA+TTA", stages=3)), inputs(cues=5)
    before = crm(visual, sentences, cues)
    second = crm(visual, sentences, [cues[0], cues[3], *cues[2:]])
    assert torch.equal(before[0], second[0]) and not torch.allclose(before[1], second[1])
    unread = crm(visual, sentences, [*cues[:3], cues[4], cues[3]])
    assert all(torch.equal(a, b) for a, b in zip(before, unread, strict=True))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_an_image_does_not_see_the_others(modulation):
    crm, (visual, sentences, cues) = perturbed(model(modulation=modulation)), inputs()
    together = crm(visual, sentences, cues)
    same([each[1:] for each in together], crm(visual[1:], sentences[1:], [cue[1:] for cue in cues]))


def test_no_image_at_all_has_no_maps():
    """As when no image of a batch has a second referent."""
    visual, sentences, cues = inputs(images=0)
    assert [each.shape for each in perturbed(model())(visual, sentences, cues)] == [(0, 3, 7)] * 2


def test_scores_are_bounded_by_the_temperature():
    visual, sentences, cues = inputs(tokens=40)
    for each in perturbed(model(temperature=0.5))(visual, sentences, cues):
        assert each.abs().max() <= 0.5 + 1e-6


def test_response_maps_lie_between_0_and_1():
    scores = torch.tensor([[-1.0, 0.0, 2.0, 4.0], [-3.0, -2.0, -1.0, -4.0], [1.0, 2.0, 3.0, 2.0], [2.0] * 4])
    expected = torch.tensor([[0, 0, 0.5, 1], [0, 0, 0, 0], [0, 0.5, 1, 0.5], [0, 0, 0, 0]])
    torch.testing.assert_close(response_maps(scores), expected)


def test_errors():
    with pytest.raises(WrisError, match="there is no modulation 'MUL'; choose one of: ADD, TTA"):
        CrmConfig(CHANNELS, modulation="MUL")
    visual, sentences, cues = inputs(cues=2)
    with pytest.raises(WrisError, match="2 cues are too few for 3 stages; repeat some"):
        model(stages=3)(visual, sentences, cues)
