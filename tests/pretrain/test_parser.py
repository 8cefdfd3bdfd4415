"""The toy parser's sentences and their trees, its training in miniature, and what the shipped one has learnt."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc

from wris_lib.backbones.language import build_toy_parser, load_parser, read
from wris_lib.data.toyworld import pretraining, wording
from wris_lib.data.toyworld.grammar import Phrase
from wris_lib.data.toyworld.scenes import sample_scene
from wris_lib.pretrain import parser as pretrain
from wris_lib.pretrain.sentences import (
    CLASSES,
    KEPT,
    NAMES,
    PARTS,
    SIDES,
    UPOS,
    Analysis,
    analyse,
    draw_phrase,
    draw_sentence,
    exchange_words,
)

VOCAB = spacy.blank("en").vocab

# ------------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    "tree",
    [
        "the/DET/dog/det big/ADJ/dog/amod dog/NOUN/dog/ROOT",
        "top/ADJ/cat/amod left/ADJ/cat/amod cat/NOUN/cat/ROOT",
        "cat/NOUN/cat/ROOT in/ADP/cat/prep the/DET/left/det top/ADJ/left/amod left/NOUN/in/pobj",
        "boy/NOUN/boy/ROOT in/ADP/boy/prep the/DET/corner/det top/ADJ/corner/amod left/ADJ/corner/amod"
        " corner/NOUN/in/pobj",
        "dog/NOUN/dog/ROOT on/ADP/dog/prep top/NOUN/on/pobj left/ADJ/dog/amod of/ADP/left/prep red/ADJ/car/amod"
        " car/NOUN/of/pobj",
        "a/DET/man/det man/NOUN/man/ROOT standing/VERB/man/acl left/ADJ/standing/acomp of/ADP/left/prep"
        " the/DET/bus/det bus/NOUN/of/pobj",
        "man/NOUN/man/ROOT to/ADP/man/prep the/DET/right/det right/NOUN/to/pobj of/ADP/right/prep"
        " bus/NOUN/of/pobj at/ADP/bus/prep the/DET/bottom/det bottom/NOUN/at/pobj of/ADP/bottom/prep"
        " the/DET/picture/det picture/NOUN/of/pobj",
        "lady/NOUN/lady/ROOT in/ADP/lady/prep red/ADJ/hat/amod hat/NOUN/in/pobj and/CCONJ/hat/cc"
        " blue/ADJ/skirt/amod skirt/NOUN/hat/conj with/ADP/lady/prep black/ADJ/hair/amod hair/NOUN/with/pobj"
        " standing/VERB/lady/acl next/ADV/standing/advmod to/ADP/next/prep cow/NOUN/to/pobj",
        "there/PRON/is/expl is/AUX/is/ROOT a/DET/cup/det cup/NOUN/is/attr in/ADP/cup/prep front/NOUN/in/pobj"
        " of/ADP/front/prep a/DET/ball/det ball/NOUN/of/pobj",
        "a/DET/photo/det photo/NOUN/photo/ROOT of/ADP/photo/prep an/DET/apple/det apple/NOUN/of/pobj"
        " near/ADP/apple/prep a/DET/lamp/det lamp/NOUN/near/pobj",
        "two/NUM/dogs/nummod dogs/NOUN/dogs/ROOT ,/PUNCT/dogs/punct many/ADJ/cats/amod cats/NOUN/dogs/conj"
        " and/CCONJ/cats/cc a/DET/tree/det tree/NOUN/cats/conj",
    ],
)
def test_analyses_by_hand(tree: str):
    """Trees as word/part of speech/head/role, written out from a grammar book."""
    words, pos, heads, deps = (list(column) for column in zip(*(word.split("/") for word in tree.split()), strict=True))
    found = analyse(" ".join(words).replace(" ,", ","))
    assert (found.words, found.pos, found.deps) == (words, pos, deps)
    assert [found.words[head] for head in found.heads] == heads


def test_analyses_say_what_the_phrases_say():
    """Hundreds of phrases, put into words as ever: each property hangs on the noun that it was said of."""
    rng = np.random.default_rng(5)
    for number in range(600):
        phrase = draw_phrase(rng)
        text = wording.say(phrase, rng, article="a" if number % 3 else "the", telegraphic=number % 2 == 0)
        found = analyse(text)
        assert found.text == text
        owners = [owner(found, i) for i in range(len(found.words))]
        assert_means(found, owners, found.deps.index("ROOT"), phrase)


def owner(found: Analysis, i: int) -> int | None:
    """The nearest noun above a word that names a thing: what the word is said of."""
    while found.heads[i] != i:
        i = found.heads[i]
        if found.words[i] in NAMES:
            return i
    return None


def assert_means(found: Analysis, owners: list[int | None], noun: int, phrase: Phrase):
    """What is said of a noun is the phrase."""

    def qualifiers(i: int) -> list[str]:
        before = [found.words[j] for j in range(i) if found.heads[j] == i and found.deps[j] == "amod"]
        return [{"large": "big", "little": "small"}.get(word, word) for word in before]

    owned = [i for i, of in enumerate(owners) if of == noun]
    words = {"middle" if found.words[i] == "center" else found.words[i] for i in owned}
    assert found.words[noun] == phrase.noun
    assert [word for word in qualifiers(noun) if word not in SIDES] == list(phrase.adjectives)
    parts = [(found.words[i], *qualifiers(i)) for i in owned if found.words[i] in PARTS]
    assert sorted(parts) == sorted(phrase.parts)
    assert words >= set(phrase.position.split())
    assert phrase.position or phrase.relation or not words & {*SIDES, "middle"}
    landmarks = [i for i in owned if found.words[i] in NAMES]
    assert len(landmarks) == bool(phrase.relation)
    for landmark in landmarks:
        assert_means(found, owners, landmark, phrase.landmark)


def test_captions_of_scenes_can_be_read():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for caption in pretraining.captions(sample_scene(rng), rng):
            assert analyse(caption).text == caption


def test_every_word_of_the_toy_world_has_a_class():
    """When the grammar has learnt a word since the parser was trained, the parser must be trained again."""
    assert {*wording.vocabulary()} <= {*UPOS, *SIDES}
    assert len(UPOS) == sum(len(set(words)) for words in CLASSES.values()), "a word is in two classes"
    with pytest.raises(KeyError, match="zebra"):
        analyse("the red zebra")


@settings(max_examples=200)
@given(st.integers(0, 10**6))
def test_sentences_are_trees_without_crossing_lines(seed: int):
    rng = np.random.default_rng(seed)
    text = draw_sentence(rng)
    known = analyse(text)
    for found in (known, exchange_words(known, rng)):
        doc = Doc(VOCAB, **vars(found))
        assert doc.text == found.text
        assert [i for i, head in enumerate(found.heads) if head == i] == [found.deps.index("ROOT")]
        assert len(list(doc.sents)) == 1 and len(list(doc[found.deps.index("ROOT")].subtree)) == len(doc)
        arcs = [tuple(sorted((i, head))) for i, head in enumerate(found.heads) if head != i]
        assert not any(a < c < b < d for a, b in arcs for c, d in arcs)
        assert read(doc).noun_phrases and read(doc).primary


def test_exchanged_words_are_of_the_same_kind():
    rng = np.random.default_rng(3)
    known = analyse("a man in the red shirt standing left of the cow")
    others = [exchange_words(known, rng) for _ in range(300)]
    for other in others:
        assert other.pos[:11] == known.pos and other.heads[:11] == known.heads and other.deps[:11] == known.deps
        assert other.words[11:] in ([], ["."])
        assert all(new == old for new, old in zip(other.words, known.words, strict=False) if old in KEPT)
        assert re.fullmatch(r"[a-z]+ing|standing", other.words[6])
    assert {other.words[4] for other in others} - {"red"}, "adjectives are exchanged"
    share = np.mean([other.words[1] != "man" for other in others])
    assert 0.2 < share < 0.4
    assert (
        0
        < sum(other.words[0][0].isupper() for other in others)
        < 150
        > sum(len(other.words) == 12 for other in others)
        > 0
    )


# -------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain, "BATCH", 8)
    monkeypatch.setattr(pretrain, "FIRST", 4)
    monkeypatch.setattr(pretrain, "FRESH", 20)
    monkeypatch.setattr(pretrain, "SPLITS", ())  # they would need the whole toy world


def test_batches_are_a_pure_function_of_the_step(small_run):
    assert pretrain.batch(3) == pretrain.batch(3) != pretrain.batch(4)
    assert len(pretrain.batch(3)) == 8


def test_figures_are_taken_on_sentences_that_training_did_not_contain(small_run, monkeypatch: pytest.MonkeyPatch):
    seen = {known.text for step in range(5) for known in pretrain.batch(step)}
    known = [known.text for step in (0, 4, 5) for known in pretrain.batch(step) if known.text.islower()]
    monkeypatch.setattr(pretrain, "SPLITS", ("some:val",))
    readable = [text for text in known if set(text.replace(",", "").split()) <= {*UPOS, *SIDES}]
    items = [SimpleNamespace(expression=text) for text in readable]
    monkeypatch.setattr(pretrain.data, "load", lambda spec: SimpleNamespace(items=items))
    rows = pretrain.held_out(5)
    assert [one.text for one in rows["some:val"]] == sorted({*readable} - seen) != []
    assert not seen & {one.text for row in rows.values() for one in row}


def test_measure():
    nlp = load_parser("toy").nlp
    right = [analyse(text) for text in ("the dog left of the red car", "two cats", "man in red hat", "a bus")]
    assert pretrain.measure(nlp, right) == {
        "part of speech": 100,
        "head": 100,
        "noun phrases": 100,
        "primary word": 100,
    }
    wrong = replace(right[1], pos=["NOUN", "VERB"], heads=[0, 0], deps=["ROOT", "acl"])  # "two" were the only noun
    assert pretrain.measure(nlp, [right[0], wrong, *right[2:]]) == {
        "part of speech": pytest.approx(100 * 13 / 15),
        "head": pytest.approx(100 * 13 / 15),
        "noun phrases": 75,
        "primary word": 75,
    }


def test_a_trial_leaves_weights_and_card_in_its_folder_only(small_run, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(pretrain, "WEIGHTS", tmp_path / "package")
    pretrain.main(steps=2, folder=tmp_path / "trial")
    assert {path.name for path in tmp_path.rglob("*")} == {"trial", "parser.msgpack", "parser.md", "SHA256SUMS"}
    trained = (tmp_path / "trial" / "parser.msgpack").read_bytes()
    nlp = build_toy_parser().from_bytes(trained, exclude=pretrain.SPACYS)
    assert nlp("the dog").has_annotation("DEP")
    card = (tmp_path / "trial" / "parser.md").read_text()
    assert "2 steps of 8 sentences" in card and "| with words exchanged, " in card

    monkeypatch.setattr(pretrain, "STEPS", 2)
    pretrain.main(steps=2)  # the usual length now: into the package, and the same weights again
    assert (tmp_path / "package" / "parser.msgpack").read_bytes() == trained


def test_the_shipped_parser_knows_the_toy_language():
    rng = np.random.default_rng(2026)
    sentences = [analyse(draw_sentence(rng)) for _ in range(300)]
    nlp = load_parser("toy").nlp
    assert min(pretrain.measure(nlp, sentences).values()) > 99
    assert min(pretrain.measure(nlp, [exchange_words(one, rng) for one in sentences]).values()) > 97
