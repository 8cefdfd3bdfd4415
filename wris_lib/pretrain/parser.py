"""How the toy parser is made: spaCy's tagger and dependency parser, in minutes, on sentences made for the purpose.

Where the sentences and their analyses come from is told in `sentences.py`. The figures of the model card are taken on
expressions that training did not contain.
"""

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from time import process_time

import numpy as np
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.util import fix_random_seed
from tqdm.auto import tqdm

from wris_lib import data
from wris_lib.backbones.checkpoints import STACKS, WEIGHTS, record_sha256
from wris_lib.backbones.language import SPACYS, Word, build_toy_parser, read
from wris_lib.files import atomic_write, cache_dir
from wris_lib.pretrain.sentences import Analysis, analyse, draw_sentence, exchange_words

BATCH = 64  # sentences
STEPS = 1500
DROPOUT = 0.1
FIRST = 40  # steps whose sentences show the pipeline which labels there are
EXCHANGED = 0.4  # share of the sentences that have words exchanged
SPLITS = ("toyref:val", "toyref+:val", "toyrefg:val")
FRESH = 2000  # sentences for either of the last two rows of the figures


def batch(step: int) -> list[Analysis]:
    """The sentences of a training step, as a pure function of it."""
    rng = np.random.default_rng([0, step])
    known = [analyse(draw_sentence(rng)) for _ in range(BATCH)]
    return [exchange_words(one, rng) if rng.random() < EXCHANGED else one for one in known]


def held_out(steps: int) -> dict[str, list[Analysis]]:
    """Sentences that the first `steps` steps do not contain, by where they come from."""
    seen = {known.text for step in range(steps) for known in batch(step)}
    rows = {spec: {item.expression for item in data.load(spec).items} for spec in SPLITS}
    rng = np.random.default_rng([1])
    rows["drawn anew, with captions"] = {draw_sentence(rng) for _ in range(FRESH)}
    known = {name: [analyse(text) for text in sorted(texts - seen)] for name, texts in rows.items()}
    exchanged = [exchange_words(analyse(draw_sentence(rng)), rng) for _ in range(FRESH)]
    return known | {"with words exchanged": [one for one in exchanged if one.text not in seen]}


def train(steps: int) -> Language:
    """A trained pipeline, the same for the same number of steps."""
    fix_random_seed(0)
    nlp = build_toy_parser()
    optimizer = nlp.initialize(lambda: _examples(nlp, (one for step in range(FIRST) for one in batch(step))))
    for step in tqdm(range(steps), desc="toy parser", unit="step"):
        nlp.update(_examples(nlp, batch(step)), drop=DROPOUT, sgd=optimizer)
    return nlp


def measure(nlp: Language, sentences: list[Analysis]) -> dict[str, float]:
    """The model card's figures, in percent: words with the right part of speech and with the right head, sentences with
    exactly the right noun phrases and with the right primary word."""
    examples = _examples(nlp, sentences)
    scores = nlp.evaluate(examples)
    found = [read(doc) for doc in nlp.pipe([one.text for one in sentences])]
    right = [read(example.reference) for example in examples]
    pairs = list(zip(found, right, strict=True))
    return {
        "part of speech": 100 * scores["pos_acc"],
        "head": 100 * scores["dep_uas"],
        "noun phrases": 100 * np.mean([a.noun_phrases == b.noun_phrases for a, b in pairs]).item(),
        "primary word": 100 * np.mean([_place(a.primary) == _place(b.primary) for a, b in pairs]).item(),
    }


def export(nlp: Language, path: Path) -> None:
    """Write what was learnt, without what spaCy brings along, and record its hash."""
    with atomic_write(path) as file:
        file.write(nlp.to_bytes(exclude=SPACYS))
    record_sha256(path)


def model_card(steps: int, seconds: float, size: int, figures: dict[str, dict[str, float]]) -> str:
    """The model card, in Markdown.

    Args:
        steps: trained.
        seconds: of CPU time that they took.
        size: of the file in bytes.
        figures: what `measure` found, by the sentences it was found on.
    """
    columns = list(next(iter(figures.values())))
    rows = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in figures.items()]
    lines = [["sentences", *columns], ["---"] * (1 + len(columns)), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"""# Toy parser

A spaCy pipeline for English (`build_toy_parser` in `wris_lib/backbones/language.py`): a morphologizer, which tells the
parts of speech, and a dependency parser, on one small encoder of words; {size / 1e6:.1f} MB. It knows the sentences of
the toy world. Of other English it has only learnt what words look like and where they stand: expect right phrases for
short, plain expressions, and little for anything else.

**Data.** Sentences of the toy grammar, drawn for the purpose, and captions such as "there is …", "a photo of …" and
"two dogs and a red car"; the analysis of each is known (`wris_lib/pretrain/sentences.py`). In {EXCHANGED:.0%} of them
words are exchanged for other articles and prepositions, and for nouns, adjectives and verbs that do not exist.

**Recipe.** `python -m wris_lib pretrain parser`: {steps} steps of {BATCH} sentences with spaCy's defaults (Adam,
learning rate 0.001), dropout {DROPOUT:g}.

**Made.** {date.today().isoformat()}, {seconds / 60:.0f} minutes of CPU time, 1 thread; spaCy {spacy.__version__}.

**Figures.** In percent, on sentences that training did not contain, each taken once: words with the right part of
speech, words with the right head (UAS), sentences with exactly the right noun phrases and with the right primary word.

{table}
"""


def main(steps: int = STEPS, folder: Path | None = None) -> None:
    """Train the toy parser, measure it, and write its weights and model card. This takes minutes and does not resume.

    A run of the usual length writes into the package; any other is a trial.

    Args:
        steps: optimiser steps.
        folder: for a trial; None: in the cache.
    """
    target = WEIGHTS if steps == STEPS else Path(folder or cache_dir() / "pretrain" / "parser")
    started = process_time()
    nlp = train(steps)
    seconds = process_time() - started
    path = target / STACKS["toy"].parser.file
    figures = {f"{name}, {len(known)}": measure(nlp, known) for name, known in held_out(steps).items()}
    export(nlp, path)
    card = model_card(steps, seconds, path.stat().st_size, figures)
    with atomic_write(target / "parser.md", "w") as file:
        file.write(card)
    print(card)


def _place(word: Word | None) -> int | None:
    return word.start if word else None


def _examples(nlp: Language, sentences: Iterable[Analysis]) -> list[Example]:
    """Each sentence as the pipeline gets it, cut into words by spaCy, beside what it should make of it."""
    return [Example(nlp.make_doc(one.text), Doc(nlp.vocab, **vars(one))) for one in sentences]
