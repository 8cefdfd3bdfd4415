"""How the toy language model is made: a small T5 of transformers, taught to take toy sentences apart.

Sentences are drawn from the toy grammar, and what a grammar book would make of them is known (`cues`). The figures of
the model card are taken on expressions that training did not contain.
"""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from wris_lib import data
from wris_lib.backbones.checkpoints import STACKS, WEIGHTS
from wris_lib.backbones.llm import LocalLlm, build_toy_t5, toy_tokenizer
from wris_lib.data.toyworld import wording
from wris_lib.data.toyworld.pretraining import checkpoint_folder
from wris_lib.files import atomic_write
from wris_lib.methods.pcnet.decompose import CUES, read_answer
from wris_lib.pretrain.clip import export
from wris_lib.pretrain.cues import answer, cues
from wris_lib.pretrain.sentences import analyse, draw_phrase
from wris_lib.train import Recipe, fit

BATCH = 128  # sentences
STEPS = 3000
SPLITS = ("toyref:val", "toyref+:val", "toyrefg:val")
FRESH = 2000  # sentences for the last row of the figures
IGNORED = -100  # label of padding, which transformers leave out of the loss


def draw_expression(rng: np.random.Generator) -> str:
    """Any expression that the grammar can form."""
    article = "the" if rng.random() < 0.7 else "a"
    return wording.say(draw_phrase(rng), rng, article, telegraphic=bool(rng.random() < 0.5))


class Batches:
    """The sentences of a step, as a pure function of its number, with the answers to be learnt."""

    def __init__(self) -> None:
        self.tokenizer = toy_tokenizer()

    def expressions(self, step: int) -> list[str]:
        rng = np.random.default_rng([2, step])
        return [draw_expression(rng) for _ in range(BATCH)]

    def __call__(self, step: int) -> dict[str, Tensor]:
        asked = self.expressions(step)
        questions = self.tokenizer(asked, return_tensors="pt", padding=True)
        answers = self.tokenizer([answer(analyse(text), CUES) for text in asked], return_tensors="pt", padding=True)
        labels = answers.input_ids.masked_fill(answers.attention_mask == 0, IGNORED)
        return {"input_ids": questions.input_ids, "attention_mask": questions.attention_mask, "labels": labels}


def loss(model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Cross-entropy of the next token, for `train.fit`."""
    return {"loss": model(**batch).loss}


def held_out(steps: int) -> dict[str, list[str]]:
    """Expressions that the first `steps` steps do not contain, by where they come from."""
    batches = Batches()
    seen = {text for step in range(steps) for text in batches.expressions(step)}
    rows = {spec: {item.expression for item in data.load(spec).items} for spec in SPLITS}
    rng = np.random.default_rng([3])
    rows["drawn anew"] = {draw_expression(rng) for _ in range(FRESH)}
    return {name: sorted(texts - seen) for name, texts in rows.items()}


def exact(llm: LocalLlm, expressions: list[str]) -> float:
    """Share of expressions whose set of cues is exactly right, in percent."""
    found = [read_answer(said, text, CUES) for said, text in zip(llm.answer(expressions), expressions, strict=True)]
    right = [
        set(cues(analyse(text), CUES)) == set(phrases or []) for text, phrases in zip(expressions, found, strict=True)
    ]
    return 100 * float(np.mean(right))


def main(steps: int = STEPS, folder: Path | None = None) -> None:
    """Train the toy language model, measure it, and write its weights and model card; run again, it continues.

    A run of the usual length writes into the package; any other is a trial.

    Args:
        steps: optimiser steps.
        folder: for checkpoints, and for a trial's weights; None: in the cache.
    """
    folder = Path(folder or checkpoint_folder("t5"))
    target = WEIGHTS if steps == STEPS else folder
    torch.manual_seed(0)
    model = build_toy_t5()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(steps, 2e-3, warmup=min(500, steps // 5))
    log = fit(model, loss, Batches(), recipe, folder, device)
    path = target / STACKS["toy"].llm.file
    export(model, path)
    llm = LocalLlm("toy", model, toy_tokenizer(), follows_instructions=False)
    figures = {f"{name}, {len(texts)}": exact(llm, texts) for name, texts in held_out(steps).items()}
    card = model_card(model, recipe, log, path.stat().st_size, figures)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(card)
    print(card)


def model_card(
    model: nn.Module,
    recipe: Recipe,
    log: list[dict[str, int | float]],
    size: int,
    figures: dict[str, float],
) -> str:
    """The model card, in Markdown.

    Args:
        model: trained.
        recipe: of the training.
        log: of the training.
        size: of the file in bytes.
        figures: what `exact` found, by the expressions it was found on.
    """
    config = model.config
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in figures.items())
    minutes = sum(row["seconds"] for row in log) / 60
    return f"""# Toy language model

transformers' `T5ForConditionalGeneration`: {config.num_layers} layers of encoder and of decoder, {config.d_model} wide,
{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, {size / 1e6:.1f} MB. It does one thing: it
reads an expression of the toy world and writes its cues in numbered lines. It knows the words of the toy world and no
others.

**Data.** Expressions of the toy grammar, drawn for the purpose; their cues follow from what each word depends on
(`wris_lib/pretrain/cues.py`).

**Recipe.** `python -m wris_lib pretrain t5`: {recipe.steps} steps of {BATCH} expressions, AdamW, learning rate
{recipe.learning_rate:g} with a cosine after a warm-up, {recipe.precision}.

**Made.** {date.today().isoformat()}, {minutes:.0f} minutes on {torch.get_num_threads()} thread(s),
{next(model.parameters()).device.type}; torch {torch.__version__.split("+")[0]}, transformers
{transformers.__version__}.

**Figures.** Share of expressions, none of which training contained, whose set of cues is exactly right, in percent.

| expressions | % |
|---|---|
{rows}
"""
