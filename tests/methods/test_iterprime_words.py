"""Tokens of words: against sets of characters, and with a tokenizer that splits and does not know words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from wris_lib.backbones.language import EFFECTIVE, Parse, Word
from wris_lib.methods.iterprime.words import PREFIX, Pieces, find_pieces

UPOS = {"the": "DET", "of": "ADP", "is": "AUX", "left": "ADV", "on": "ADP", "red": "ADJ", "two": "NUM", "runs": "VERB"}
SPECIAL = (0, 0)


def parse_of(text: str, primary: str | None = None) -> Parse:
    """Words between blanks; those not in `UPOS` are nouns, and `primary` is the first of that form."""
    words, place = [], 0
    for form in text.split():
        place = text.index(form, place)
        words.append(Word(form, UPOS.get(form, "NOUN"), place, place + len(form)))
        place += len(form)
    return Parse(text, words, [text], next((word for word in words if word.text == primary), None))


def spans_of(text: str, longest: int = 3) -> list[tuple[int, int]]:
    """Each word of `PREFIX` and the text in pieces of at most so many characters."""
    spans = []
    for word in parse_of(PREFIX + text).words:
        spans += [(start, min(start + longest, word.end)) for start in range(word.start, word.end, longest)]
    return [SPECIAL, *spans, SPECIAL]


def pieces_of(text: str, primary: str | None = None, longest: int = 3) -> Pieces:
    parse = parse_of(text, primary)
    return find_pieces(parse, spans_of(text, longest), parse.primary)


def slow_pieces(parse: Parse, spans: list[tuple[int, int]], primary: Word | None) -> tuple[list[int], list[int]]:
    """A token is a word's when they share a character."""
    own, effective = [], []
    for token, (start, end) in enumerate(spans):
        characters = {place - len(PREFIX) for place in range(start, end)}
        if primary is not None and characters & set(range(primary.start, primary.end)):
            own.append(token)
            effective.append(token)
            continue
        for word in parse.words:
            if word.upos in EFFECTIVE and characters & set(range(word.start, word.end)):
                effective.append(token)
                break
    return effective, own


# [CLS] the re is a | then the expression's own tokens, from 5 on
@pytest.mark.parametrize(
    ("text", "primary", "effective", "own", "context"),
    [
        ("dog", "dog", [5], [5], []),
        ("the dog", "dog", [6], [6], []),
        ("the red dog", "dog", [6, 7], [7], [6]),
        ("dog on the two red car", "dog", [5, 8, 9, 10], [5], [8, 9, 10]),
        ("the red zebra", "zebra", [6, 7, 8], [7, 8], [6]),
        ("elephant", "elephant", [5, 6, 7], [5, 6, 7], []),
        ("zebra left of the elephant", "zebra", [5, 6, 11, 12, 13], [5, 6], [11, 12, 13]),
    ],
)
def test_pieces_of_one_and_of_several_tokens(text, primary, effective, own, context):
    found = pieces_of(text, primary)
    assert (found.effective, found.primary, found.context) == (effective, own, context)


def test_no_primary_word():
    assert pieces_of("red runs") == Pieces([5, 6, 7], [])
    assert pieces_of("red runs").context == [5, 6, 7]


@pytest.mark.parametrize("text", ["the", "on the", "is", "left of the", ""])
def test_only_stop_words_or_nothing(text):
    """The prefix does not count, either, whatever its words are."""
    assert pieces_of(text) == Pieces([], [])


def test_another_occurrence_of_the_primary_word_is_context():
    found = pieces_of("dog on the dog", "dog")
    assert (found.primary, found.context) == ([5], [8])


def test_a_primary_word_that_is_not_effective_still_counts_among_the_effective_ones():
    parse = parse_of("the red dog")
    found = find_pieces(parse, spans_of("the red dog"), parse.words[0])
    assert (found.effective, found.primary, found.context) == ([5, 6, 7], [5], [6, 7])


def test_a_word_that_was_cut_off_is_absent():
    text = "red zebra on the elephant"
    parse, spans = parse_of(text, "elephant"), spans_of(text)
    assert find_pieces(parse, spans, parse.primary) == Pieces([5, 6, 7, 10, 11, 12], [10, 11, 12])
    assert find_pieces(parse, [*spans[:11], SPECIAL], parse.primary) == Pieces([5, 6, 7, 10], [10])
    assert find_pieces(parse, [*spans[:10], SPECIAL], parse.primary) == Pieces([5, 6, 7], [])
    assert find_pieces(parse, [*spans[:7], SPECIAL], parse.primary) == Pieces([5, 6], [])


def test_a_token_over_two_words_is_the_primary_ones():
    """Parsers split where tokenizers do not."""
    text, start = "redcar", len(PREFIX)
    red, car = Word("red", "ADJ", 0, 3), Word("car", "NOUN", 3, 6)
    parse = Parse(text, [red, car], [text], car)
    assert find_pieces(parse, [SPECIAL, (start, start + 6), SPECIAL], car) == Pieces([1], [1])
    split = [SPECIAL, (start, start + 2), (start + 2, start + 4), (start + 4, start + 6), SPECIAL]
    found = find_pieces(parse, split, car)
    assert (found.effective, found.primary, found.context) == ([1, 2, 3], [2, 3], [1])


FORMS = st.sampled_from([*UPOS, "dog", "zebra", "elephant", "a"])


@given(st.lists(FORMS, max_size=7), st.integers(1, 9), st.integers(0, 30), st.data())
def test_pieces_are_tokens_that_share_characters(forms, longest, cut, data):
    text = " ".join(forms)
    parse, spans = parse_of(text), spans_of(text, longest)[: cut + 1]
    primary = data.draw(st.sampled_from([None, *parse.words]))
    found = find_pieces(parse, spans, primary)
    assert (found.effective, found.primary) == slow_pieces(parse, spans, primary)
    assert set(found.context) == set(found.effective) - set(found.primary)
    assert found.effective == sorted(set(found.effective)) and set(found.primary) <= set(found.effective)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizerFast:
    path = Path(tmp_path_factory.mktemp("vocabulary")) / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "there", "is", "a", "the", "red", "ze", "##b", "##ra", "car"]
    path.write_text("\n".join(words), encoding="utf-8")
    return BertTokenizerFast(vocab_file=str(path), do_lower_case=True)


@pytest.mark.parametrize(
    ("text", "primary", "own", "context"),
    [
        ("the red zebra", "zebra", ["ze", "##b", "##ra"], ["red"]),
        ("the RED Zébra car", "Zébra", ["ze", "##b", "##ra"], ["red", "car"]),
        ("red xylophone", "xylophone", ["[UNK]"], ["red"]),
        ("red 🐕", "🐕", ["[UNK]"], ["red"]),
    ],
)
def test_with_a_real_tokenizer(tokenizer, text, primary, own, context):
    encoded = tokenizer(PREFIX + text, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    parse = parse_of(text.replace("RED", "red"), primary)
    found = find_pieces(parse, [tuple(span) for span in encoded["offset_mapping"]], parse.primary)
    assert ([tokens[token] for token in found.primary], [tokens[token] for token in found.context]) == (own, context)
