"""The toy language model's sentences, its training in miniature, and what the shipped one has learnt."""

import pytest
import torch

from wris_lib.backbones import checkpoints
from wris_lib.backbones.llm import LocalLlm, build_toy_t5, load_llm
from wris_lib.errors import WrisError
from wris_lib.methods.pcnet.decompose import CUES
from wris_lib.pretrain import t5
from wris_lib.pretrain.cues import cues
from wris_lib.pretrain.sentences import analyse


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(t5, "BATCH", 4)
    monkeypatch.setattr(t5, "FRESH", 5)
    monkeypatch.setattr(t5, "SPLITS", ())


def test_a_batch_holds_the_sentences_and_their_cues(small):
    batches = t5.Batches()
    batch, texts = batches(3), batches.expressions(3)
    assert len(texts) == 4 and texts == batches.expressions(3) != batches.expressions(4)
    decode = batches.tokenizer.decode
    for row, text in enumerate(texts):
        assert decode(batch["input_ids"][row], skip_special_tokens=True) == text
        answer = batch["labels"][row]
        written = decode(answer[answer != t5.IGNORED], skip_special_tokens=True)
        lines = [line.strip().split(". ", 1)[1] for line in written.split("\n")]
        assert lines == cues(analyse(text), CUES)


def test_padding_is_not_learnt(small):
    batch = t5.Batches()(0)
    assert ((batch["labels"] == t5.IGNORED).sum(dim=1) > 0).any()
    model = build_toy_t5()
    alone = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(4)]
    counts = torch.tensor([float((each["labels"] != t5.IGNORED).sum()) for each in alone])
    losses = torch.stack([t5.loss(model, each, 0)["loss"] for each in alone])
    torch.testing.assert_close(t5.loss(model, batch, 0)["loss"], (losses * counts).sum() / counts.sum())


def test_what_is_measured_was_not_trained_on(small, monkeypatch):
    held = t5.held_out(50)["drawn anew"]
    seen = {text for step in range(50) for text in t5.Batches().expressions(step)}
    assert held and not seen & set(held)


class Parrot(LocalLlm):
    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def answer(self, prompts):
        yield from (self.answers[prompt] for prompt in prompts)


def test_a_set_of_cues_is_exactly_right_or_wrong():
    answers = {
        "the red dog": "1. a dog\n2. the red dog",
        "red cat": "1. the red cat\n2. a cat",  # another order is the same set
        "big cup": "1. a cup",
        "blue car": "a car",
    }
    assert t5.exact(Parrot(answers), list(answers)) == 50


def test_training_writes_weights_and_card_and_resumes(small, tmp_path, capsys, monkeypatch):
    t5.main(2, tmp_path)
    first = (tmp_path / "t5.safetensors").read_bytes()
    card = (tmp_path / "t5.md").read_text()
    assert "2 steps of 4 expressions" in card and "| drawn anew, 5 | " in card and card in capsys.readouterr().out
    monkeypatch.setattr(t5.Batches, "__call__", None)  # nothing is left to be trained
    t5.main(2, tmp_path)
    assert (tmp_path / "t5.safetensors").read_bytes() == first


def test_the_shipped_model_takes_sentences_apart(monkeypatch):
    monkeypatch.setattr(t5, "SPLITS", ())
    monkeypatch.setattr(t5, "FRESH", 100)
    llm = load_llm("toy")
    assert not llm.follows_instructions
    assert checkpoints.checkpoint_path(checkpoints.STACKS["toy"].llm).stat().st_size < 8e6
    expressions = t5.held_out(0)["drawn anew"]
    assert t5.exact(llm, expressions) >= 95


def test_new_weights_have_another_identity_and_the_same_name(tmp_path, monkeypatch):
    shipped = load_llm("toy")
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    t5.export(build_toy_t5(), tmp_path / shipped.name)
    retrained = load_llm("toy")
    assert retrained.name == shipped.name == "t5.safetensors" and retrained.identity != shipped.identity


def test_weights_of_another_model(tmp_path, monkeypatch):
    stack = checkpoints.STACKS["toy"]
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    path = tmp_path / stack.llm.file
    t5.export(torch.nn.Linear(2, 2), path)
    with pytest.raises(WrisError, match="was made for another model"):
        load_llm("toy")
