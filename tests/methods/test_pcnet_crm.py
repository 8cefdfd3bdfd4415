import numpy as np
import pytest
import torch
from torch import Tensor

from wris_lib.errors import WrisError
from wris_lib.methods.pcnet.crm import MODULATIONS, Crm, CrmConfig, response_maps


def model(**changes: object) -> Crm:
    torch.manual_seed(0)
    return Crm(CrmConfig(5, 4, width=6, **changes))


def inputs(images: int = 2, texts: int = 3, tokens: int = 7, cues: int = 5) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(1)
    sentences = torch.randn(images, texts, 4)
    return torch.randn(images, tokens, 5), sentences, [torch.randn(images, texts, 4) for _ in range(cues)]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if layer.bias is None else layer.bias.detach().numpy()
    return x @ layer.weight.detach().numpy().T + bias


def attend(layer: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rows = []
    for row in x:
        alike = np.array([linear(layer.query, row) @ linear(layer.key, other) for other in y]) / np.sqrt(len(row))
        weights = np.exp(alike - alike.max())
        rows.append(weights / weights.sum() @ linear(layer.value, y))
    return np.stack(rows)


def mlp(layers: torch.nn.Sequential, x: np.ndarray) -> np.ndarray:
    return linear(layers[2], np.maximum(linear(layers[0], x), 0))


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_equals_the_equations_image_by_image(modulation):
    crm = model(modulation=modulation, residual=0.7)
    visual, sentences, cues = inputs()
    maps = crm(visual, sentences, cues)
    assert len(maps) == 3
    for b in range(len(visual)):
        v, q = linear(crm.visual_in, visual[b].numpy()), linear(crm.text_in, sentences[b].numpy())
        for stage, cue, found in zip(crm.stages, cues, maps, strict=False):
            v, q, c = unit(v), unit(q), unit(linear(crm.text_in, cue[b].numpy()))
            if modulation.startswith("VTA"):
                c = c + 0.7 * mlp(stage.image_mlp, attend(stage.ask_image, c, v))
            q = q + 0.7 * (mlp(stage.cues_mlp, attend(stage.ask_cues, q, c)) if modulation.endswith("TTA") else c)
            v = v + 0.7 * attend(stage.ask_sentence, v, q)
            expected = crm.config.temperature * unit(q) @ unit(v).T
            np.testing.assert_allclose(found[b].detach().numpy(), expected, atol=1e-5)


def test_without_stages_sentences_are_compared_with_the_image_as_they_are():
    crm = model(stages=0)
    visual, sentences, cues = inputs()
    (found,) = crm(visual, sentences, [])
    v, q = linear(crm.visual_in, visual[0].numpy()), linear(crm.text_in, sentences[0].numpy())
    np.testing.assert_allclose(found[0].detach().numpy(), np.log(1 / 0.07) * unit(q) @ unit(v).T, atol=1e-5)
    assert len(cues) == 5


def test_everything_is_trained():
    crm = model()
    torch.cat(crm(*inputs()), dim=1).square().sum().backward()
    assert [name for name, p in crm.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_cues_change_what_is_seen_and_only_those_that_are_read():
    crm = model()
    visual, sentences, cues = inputs()
    before = crm(visual, sentences, cues)
    second = crm(visual, sentences, [cues[0], cues[3], *cues[2:]])
    assert torch.equal(before[0], second[0]) and not torch.allclose(before[1], second[1])
    unread = crm(visual, sentences, [*cues[:3], cues[4], cues[3]])
    assert all(torch.equal(a, b) for a, b in zip(before, unread, strict=True))


def test_an_image_does_not_see_the_others():
    crm = model()
    visual, sentences, cues = inputs()
    together = crm(visual, sentences, cues)
    alone = crm(visual[1:], sentences[1:], [cue[1:] for cue in cues])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b)


def test_response_maps_lie_between_0_and_1():
    scores = torch.tensor([[-1.0, 0.0, 2.0, 4.0], [-3.0, -2.0, -1.0, -4.0], [1.0, 2.0, 3.0, 2.0]])
    expected = torch.tensor([[0, 0, 0.5, 1], [0, 0, 0, 0], [0, 0.5, 1, 0.5]])
    torch.testing.assert_close(response_maps(scores), expected)


def test_errors():
    with pytest.raises(WrisError, match="there is no modulation 'MUL'; choose one of: ADD, TTA"):
        CrmConfig(5, 4, modulation="MUL")
    visual, sentences, cues = inputs(cues=2)
    with pytest.raises(WrisError, match="2 cues are too few for 3 stages; repeat some"):
        model()(visual, sentences, cues)
