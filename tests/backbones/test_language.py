"""Noun phrases, effective words and the primary word: by hand, on nasty input, and with each stack's pipeline."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc

from wris_lib.backbones import checkpoints, language
from wris_lib.backbones.checkpoints import record_sha256
from wris_lib.backbones.language import Parser, Word, load_parser, read
from wris_lib.errors import WrisError


@pytest.fixture(scope="module")
def toy() -> Parser:
    return load_parser("toy")


# ------------------------------------------------------------------------------------------------ rules, by hand


VOCAB = spacy.blank("en").vocab


def doc(*words: tuple[str, str, int, str], spaces: list[bool] | None = None) -> Doc:
    """A text parsed by hand: (word, part of speech, index of its head, what it is to its head)."""
    texts, pos, heads, deps = (list(column) for column in zip(*words, strict=True))
    return Doc(VOCAB, words=texts, spaces=spaces, pos=pos, heads=heads, deps=deps)


def test_noun_phrases_and_the_primary_word():
    parse = read(
        doc(
            ("the", "DET", 2, "det"),
            ("ticket", "NOUN", 2, "compound"),
            ("inspector", "NOUN", 2, "ROOT"),
            ("with", "ADP", 2, "prep"),
            ("Bob", "PROPN", 3, "pobj"),
            ("holding", "VERB", 2, "acl"),
            ("two", "NUM", 8, "nummod"),
            ("red", "ADJ", 8, "amod"),
            ("cups", "NOUN", 5, "dobj"),
            ("!", "PUNCT", 2, "punct"),
        )
    )
    assert parse.noun_phrases == ["the ticket inspector", "Bob", "two red cups"]
    assert parse.primary == Word("inspector", "NOUN", 11, 20)  # the rightmost noun of the leftmost phrase
    assert [word.text for word in parse.effective] == ["ticket", "inspector", "Bob", "holding", "two", "red", "cups"]
    assert [word.text for word in parse.words] == parse.expression.split()
    assert [parse.expression[word.start : word.end] for word in parse.words] == [word.text for word in parse.words]


def test_a_name_can_be_the_primary_word():
    parse = read(doc(("Bob", "PROPN", 0, "ROOT"), ("left", "VERB", 0, "acl")))
    assert parse.noun_phrases == ["Bob"] and parse.primary.text == "Bob"


def test_pronouns_are_no_phrases():
    words = [("it", "PRON", 1, "nsubj"), ("is", "AUX", 1, "ROOT"), ("the", "DET", 3, "det"), ("dog", "NOUN", 1, "attr")]
    parse = read(doc(*words))
    assert parse.noun_phrases == ["the dog"] and parse.primary == Word("dog", "NOUN", 10, 13)
    alone = read(doc(("him", "PRON", 0, "ROOT")))
    assert (alone.noun_phrases, alone.effective, alone.primary) == (["him"], [], None)


def test_without_a_noun_phrase_the_last_common_noun():
    # "dep" is no role that spaCy's rules know a noun phrase by.
    words = [("standing", "VERB", 0, "ROOT"), ("man", "NOUN", 0, "dep"), ("tree", "NOUN", 0, "dep")]
    parse = read(doc(*words, ("Bob", "PROPN", 0, "dep")))
    assert parse.noun_phrases == ["standing man tree Bob"]
    assert parse.primary == Word("tree", "NOUN", 13, 17)


def test_without_a_noun_no_primary_word():
    parse = read(doc(("far", "ADV", 1, "advmod"), ("left", "ADJ", 1, "ROOT")))
    assert (parse.noun_phrases, parse.primary) == (["far left"], None)
    assert [word.text for word in parse.effective] == ["left"]


def test_white_space_is_no_word():
    words = [("  ", "NOUN", 1, "amod"), ("dog", "NOUN", 1, "ROOT"), ("\n", "NOUN", 1, "conj")]
    parse = read(doc(*words, spaces=[False] * 3))
    assert parse.expression == "  dog\n" and parse.noun_phrases == ["dog"]
    assert parse.words == [Word("dog", "NOUN", 2, 5)] and parse.primary == parse.words[0]


# ------------------------------------------------------------------------------------------------- the toy stack


@pytest.mark.parametrize(
    ("expression", "noun_phrases", "effective", "primary"),
    [
        ("dog", ["dog"], "dog", "dog"),
        ("top left dog", ["top left dog"], "top left dog", "dog"),
        ("the big spotted cow", ["the big spotted cow"], "big spotted cow", "cow"),
        (
            "the man in the green shirt and the blue hat standing next to the red car",
            ["the man", "the green shirt", "the blue hat", "the red car"],
            "man green shirt blue hat standing red car",
            "man",
        ),
        ("boat left of orange train", ["boat", "orange train"], "boat left orange train", "boat"),
        ("the cup on the left side", ["the cup", "the left side"], "cup left side", "cup"),
        ("two dogs, a cat and three trees", ["two dogs", "a cat", "three trees"], "two dogs cat three trees", "dogs"),
        ("there is a woman with red hair", ["a woman", "red hair"], "woman red hair", "woman"),
        ("a zobbly wug in the plaid jacket", ["a zobbly wug", "the plaid jacket"], "zobbly wug plaid jacket", "wug"),
    ],
)
def test_toy_parser(toy: Parser, expression: str, noun_phrases: list[str], effective: str, primary: str):
    (parse,) = toy.parse([expression])
    assert parse.noun_phrases == noun_phrases
    assert [word.text for word in parse.effective] == effective.split()
    assert parse.primary.text == primary


NASTY = [
    "",
    " ",
    "?!...",
    "...dog...",
    "42",
    "3 0 7",
    "🐶",
    "🐶 left 🚗!!",
    "gurl w/ teh bleu shrit on teh rihgt",
    "gray,shirt,guy",
    "THE MAN IN THE GREEN SHIRT",
    "who",
    "can't see him, he's behind",
    "l'homme à gauche de la voiture rouge",
    "左边的狗",
    "собака слева",
    "الكلب على اليسار",
    "e\u0301tude \u200b\u202e dog",
    "a\x00b",
    "<b>dog</b> http://example.org/?q=1 a@b.c",
    "the dog\n\n\tnext to\r\nthe cat",
    "dog " * 2000,
    "x" * 5000,
]


def assert_sound(parse: language.Parse, expression: str):
    assert parse.expression == expression
    assert parse.noun_phrases and all(phrase in expression for phrase in parse.noun_phrases)
    assert all(parse.noun_phrases) or not expression.strip()
    assert all(expression[word.start : word.end] == word.text and word.text.strip() for word in parse.words)
    assert "".join("".join(word.text for word in parse.words).split()) == "".join(expression.split())
    assert all(first.end <= second.start for first, second in zip(parse.words, parse.words[1:], strict=False))
    nouns = [word for word in parse.words if word.upos in ("NOUN", "PROPN")]
    assert parse.primary in nouns if nouns else parse.primary is None


def test_nasty_input(toy: Parser):
    for expression, parse in zip(NASTY, toy.parse(NASTY), strict=True):
        assert_sound(parse, expression)
    assert toy.parse([]) == []


@settings(max_examples=40)
@given(texts=st.lists(st.text(max_size=40), max_size=4))
def test_any_text(toy: Parser, texts: list[str]):
    for expression, parse in zip(texts, toy.parse(texts), strict=True):
        assert_sound(parse, expression)


def test_many_at_once_are_as_one_by_one(toy: Parser):
    expressions = ["left dog", "the man in the green shirt above the red car", "🐶", "left dog"]
    assert toy.parse(expressions) == [toy.parse([expression])[0] for expression in expressions]


def test_what_is_no_character(toy: Parser):
    """As the command line gives it when bytes are no UTF-8; the places of the words stay."""
    (parse,) = toy.parse(["\udcff dog"])
    assert parse.expression == "? dog" and parse.primary == Word("dog", "NOUN", 2, 5)


def test_longer_than_spacy_accepts(toy: Parser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toy.nlp, "max_length", 10)
    with pytest.raises(WrisError, match="an expression has 11 characters, but at most 10 can be parsed; shorten it"):
        toy.parse(["dog", "a" * 11])


def test_the_file_is_small_and_loads_without_warnings():
    """Not even when the spaCy that trained it was another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parser = load_parser("toy")
    assert parser.parse(["left dog"])[0].noun_phrases == ["left dog"]
    assert checkpoints.checkpoint_path(checkpoints.STACKS["toy"].parser).stat().st_size < 4e6


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy parser's file, in a folder in place of the packaged weights."""
    path = tmp_path / checkpoints.STACKS["toy"].parser.file
    path.write_bytes((checkpoints.WEIGHTS / path.name).read_bytes())
    record_sha256(path)
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    return path


def test_missing_and_damaged_files(weights: Path):
    content = weights.read_bytes()
    weights.write_bytes(content[:1000] + b"?" + content[1001:])
    with pytest.raises(WrisError, match="parser.msgpack is damaged or not the file"):
        load_parser("toy")
    weights.unlink()
    with pytest.raises(WrisError, match="parser.msgpack is missing; install the library again"):
        load_parser("toy")


def test_the_file_of_another_pipeline(weights: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(language, "WIDTH", 32)
    with pytest.raises(WrisError, match="parser.msgpack was made for another pipeline; install the library again"):
        load_parser("toy")
    weights.write_bytes(b"no pipeline at all")
    record_sha256(weights)
    with pytest.raises(WrisError, match="made for another pipeline"):
        load_parser("toy")


# ----------------------------------------------------------------------------------------------- the paper stack


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    with pytest.raises(WrisError, match="en_core_web_sm is not installed") as failure:
        load_parser("paper")
    assert "`python -m spacy download en_core_web_sm`" in str(failure.value)


def test_an_installed_package(toy: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The toy pipeline, packaged as spaCy's own are, with an entity recogniser that nobody needs."""
    name = "en_core_web_sm"
    package = tmp_path / name
    package.mkdir()
    toy.nlp.add_pipe("sentencizer", name="ner")
    try:
        toy.nlp.to_disk(package / "en_pipeline-0.0.0")  # what spaCy calls a pipeline without a name
    finally:
        toy.nlp.remove_pipe("ner")
    (package / "meta.json").write_bytes((package / "en_pipeline-0.0.0" / "meta.json").read_bytes())
    (package / "__init__.py").write_text(
        "from spacy.util import load_model_from_init_py\n"
        "def load(**options):\n"
        "    return load_model_from_init_py(__file__, **options)\n"
    )
    installed = tmp_path / f"{name}-0.0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    parser = load_parser("paper")
    assert parser.nlp.pipe_names == toy.nlp.pipe_names
    expressions = ["the man in the green shirt", "left dog"]
    assert parser.parse(expressions) == toy.parse(expressions)


def test_spacy_is_imported_only_when_used():
    code = "import sys, wris_lib.backbones.language; print('spacy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
