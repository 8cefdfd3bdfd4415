"""Words: which noun phrases an expression has, which of its words carry meaning, and which one names the referent.

A spaCy pipeline tags the words and finds out which depends on which; this face reads three things out of that:

- *noun phrases*, for each of which PPT looks for a candidate (Dai & Yang 2024, arXiv 2404.11998);
- *effective words*, those with a meaning of their own, whose attention maps IteRPrimE combines, and
- the *primary word*, the noun that the others qualify (Wang et al. 2025, arXiv 2503.00936): "man" in "the man in the
  green shirt".

Words know where in the expression they stand, so that they can be matched with the pieces of any tokenizer.

spaCy takes seconds to import, so only loading a pipeline does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from wris_lib.backbones.checkpoints import (
    REINSTALL,
    Checkpoint,
    checkpoint_path,
    expected_sha256,
    get_stack,
    spacy_download,
    verify,
)
from wris_lib.errors import WrisError

NOUNS = ("NOUN", "PROPN")
EFFECTIVE = (*NOUNS, "ADJ", "VERB", "NUM")
WIDTH = 64  # of the toy pipeline
SPACYS = ("vocab", "tokenizer", "meta", "config")  # what a file of weights leaves to the installed spaCy


@dataclass(frozen=True)
class Word:
    """A word of an expression, or a punctuation mark.

    Attributes:
        text: as it is written; `expression[start:end]`.
        upos: universal part of speech, such as "NOUN".
        start: its first character in the expression, from 0.
        end: the character after its last.
    """

    text: str
    upos: str
    start: int
    end: int


@dataclass(frozen=True)
class Parse:
    """What an expression is made of.

    Attributes:
        expression: the text itself.
        words: all of them, in order.
        noun_phrases: in order, at least one: where none is found, the whole expression. They do not overlap. A pronoun
            alone ("it", "who") names nothing that one could look for, and is left out.
        primary: the last noun of the first noun phrase; without noun phrases the last common noun, otherwise None.
    """

    expression: str
    words: list[Word]
    noun_phrases: list[str]
    primary: Word | None

    @property
    def effective(self) -> list[Word]:
        """Nouns, names, adjectives, verbs and numbers, in order; there may be none."""
        return [word for word in self.words if word.upos in EFFECTIVE]


class Parser:
    """A spaCy pipeline, read by phrase and by word.

    Args:
        nlp: any pipeline that sets `token.pos_` and finds `doc.noun_chunks`.
    """

    def __init__(self, nlp: "spacy.language.Language") -> None:
        self.nlp = nlp

    def parse(self, expressions: Sequence[str]) -> list[Parse]:
        """Take expressions apart, all in one go: many at once are much faster than one by one.

        Any language and any symbols may come; what the pipeline does not understand gives poor phrases, not errors, and
        half a surrogate pair, which is no character, becomes "?".

        Raises:
            WrisError: an expression is longer than spaCy accepts.
        """
        longest = max(map(len, expressions), default=0)
        if longest > self.nlp.max_length:
            raise WrisError(
                f"an expression has {longest} characters, but at most {self.nlp.max_length} can be parsed; shorten it."
            )
        sound = [text.encode("utf-8", "replace").decode("utf-8") for text in expressions]
        return [read(doc) for doc in self.nlp.pipe(sound)]


def read(doc: "spacy.tokens.Doc") -> Parse:
    """Read phrases and words out of a parsed text."""
    words = [_word(token) for token in doc if not token.is_space]
    phrases, nouns = [], []
    for chunk in doc.noun_chunks:
        if named := [_word(token) for token in chunk if token.pos_ in NOUNS and not token.is_space]:
            phrases.append(chunk.text.strip())
            nouns = nouns or named
    nouns = nouns or [word for word in words if word.upos == "NOUN"]
    return Parse(doc.text, words, phrases or [doc.text.strip()], nouns[-1] if nouns else None)


def _word(token: "spacy.tokens.Token") -> Word:
    return Word(token.text, token.pos_, token.idx, token.idx + len(token))


def load_parser(stack: str | None = None) -> Parser:
    """The stack's parser.

    Args:
        stack: "toy" or "paper"; None: the default stack.

    Raises:
        WrisError: no such stack; its pipeline is not installed; its file is missing, damaged or of another pipeline.
    """
    parser = get_stack(stack).parser
    return Parser(_load_toy(parser) if isinstance(parser, Checkpoint) else _load_package(parser))


def build_toy_parser() -> "spacy.language.Language":
    """The toy pipeline, untrained: spaCy's usual tagger and transition-based parser on a small shared encoder.

    Words are known by their form, first letter, last three letters and shape, hashed (Miranda et al. 2022, arXiv
    2212.09255): a word that training never saw is judged by its ending and its neighbours.
    """
    import spacy

    encoder = {
        "@architectures": "spacy.Tok2Vec.v2",
        "embed": {
            "@architectures": "spacy.MultiHashEmbed.v2",
            "width": WIDTH,
            "attrs": ["NORM", "PREFIX", "SUFFIX", "SHAPE"],
            "rows": [2000, 500, 1000, 250],
            "include_static_vectors": False,
        },
        "encode": {
            "@architectures": "spacy.MaxoutWindowEncoder.v2",
            "width": WIDTH,
            "depth": 4,
            "window_size": 1,
            "maxout_pieces": 3,
        },
    }
    shared = {"@architectures": "spacy.Tok2VecListener.v1", "width": WIDTH}
    tagger = {"@architectures": "spacy.Tagger.v2", "tok2vec": shared}
    parser = {
        "@architectures": "spacy.TransitionBasedParser.v2",
        "state_type": "parser",
        "extra_state_tokens": False,
        "hidden_width": WIDTH,
        "maxout_pieces": 2,
        "use_upper": True,
        "tok2vec": shared,
    }
    nlp = spacy.blank("en")
    nlp.add_pipe("tok2vec", config={"model": encoder})
    nlp.add_pipe("morphologizer", config={"model": tagger})
    nlp.add_pipe("parser", config={"model": parser})
    return nlp


def _load_toy(checkpoint: Checkpoint) -> "spacy.language.Language":
    path = checkpoint_path(checkpoint)
    verify(path, expected_sha256(checkpoint))
    nlp = build_toy_parser()
    try:
        return nlp.from_bytes(path.read_bytes(), exclude=SPACYS)
    except Exception as error:  # spaCy's and thinc's complaints have no common type
        raise WrisError(f"{path} was made for another pipeline; {REINSTALL}.") from error


def _load_package(name: str) -> "spacy.language.Language":
    import spacy

    if not spacy.util.is_package(name):
        raise WrisError(f"spaCy's pipeline {name} is not installed; get it with `{spacy_download(name)}`.")
    return spacy.load(name, exclude=["ner", "lemmatizer"])
