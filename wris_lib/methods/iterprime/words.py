"""Which tokens of a sentence matter: those of its words with a meaning, and of the one word that names the referent.

A parser finds words, a matching model reads pieces of words. Characters are what the two have in common.
"""

from dataclasses import dataclass

from wris_lib.backbones.language import Parse, Word

PREFIX = "there is a "  # before every expression, as the matching model was taught with whole sentences


@dataclass(frozen=True)
class Pieces:
    """Tokens that matter, by their number in the text.

    Attributes:
        effective: W, of the words with a meaning, the primary word's among them, in order.
        primary: m, of the primary word; none when there is no such word.
    """

    effective: list[int]
    primary: list[int]

    @property
    def context(self) -> list[int]:
        """C, of the effective words but the primary one."""
        return [token for token in self.effective if token not in self.primary]


def find_pieces(parse: Parse, spans: list[tuple[int, int]], primary: Word | None) -> Pieces:
    """The pieces of a sentence's words. A word of which no piece is left, since the text was cut, counts as absent.

    Args:
        parse: of the expression.
        spans: characters (start, end) of each token of `PREFIX` and the expression; (0, 0) for special tokens.
        primary: the primary word, effective or not.
    """
    own = _pieces_of(primary, spans) if primary else []
    return Pieces(sorted({*own, *(token for word in parse.effective for token in _pieces_of(word, spans))}), own)


def _pieces_of(word: Word, spans: list[tuple[int, int]]) -> list[int]:
    first, behind = word.start + len(PREFIX), word.end + len(PREFIX)
    return [token for token, (start, end) in enumerate(spans) if start < behind and end > first]
