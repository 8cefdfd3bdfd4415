"""How a phrase is put into words: the sentences of the toy world, and every word in them."""

import numpy as np

from wris_lib.data.toyworld.grammar import GROUPS, Phrase, nouns_of
from wris_lib.data.toyworld.sprites import COLORS, HAIR, PATTERNS, drawings, supercategories

CLOTHES = ("shirt", "trousers", "skirt", "dress", "hat")  # "in the red hat"; anything else is "with the red bag"

_POSITION_WORDS = {
    "left": ("on the left", "on the left side", "at left"),
    "right": ("on the right", "on the right side", "at right"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom", "at the bottom of the picture"),
    "middle": ("in the middle", "in the center"),
}
_RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "next to": ("next to", "beside", "near"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
_SIZE_WORDS = {"big": ("big", "large"), "small": ("small", "little")}


def say(phrase: Phrase, rng: np.random.Generator, article: str = "the", telegraphic: bool = False) -> str:
    """Put a phrase into words.

    Args:
        article: "the" or "a", for the head noun.
        telegraphic: as RefCOCO's users type: "left dog", "guy in red shirt".
    """
    head = [_pick(_SIZE_WORDS.get(word, (word,)), rng) for word in phrase.adjectives]
    words = [*head, phrase.noun]
    inner = "" if telegraphic else "the "
    clauses = []
    clothes = [(part, word) for part, word in phrase.parts if part in CLOTHES]
    others = [(part, word) for part, word in phrase.parts if part not in CLOTHES]
    for preposition, group in (("in", clothes), ("with", others)):
        if group:
            clauses.append(f"{preposition} " + " and ".join(_say_part(p, w, inner) for p, w in group))
    if phrase.position:
        short = telegraphic and phrase.position != "middle" and rng.random() < 0.6
        if short:
            words = [phrase.position, *words]
        elif phrase.position in _POSITION_WORDS:
            clauses.append(_pick(_POSITION_WORDS[phrase.position], rng))
        else:
            clauses.append(f"in the {phrase.position}" + ("" if rng.random() < 0.5 else " corner"))
    if phrase.relation:
        verb = _pick(("", "", "standing "), rng) if not telegraphic else ""
        upright = set(supercategories().get("people", ())) | set(supercategories().get("animals", ()))
        verb = verb if phrase.noun in upright else ""
        landmark = say(phrase.landmark, rng, telegraphic=telegraphic)
        clauses.append(f"{verb}{_pick(_RELATION_WORDS[phrase.relation], rng)} {landmark}")
    text = " ".join([*words, *clauses])
    return text if telegraphic else f"{article_for(text) if article == 'a' else article} {text}"


def article_for(text: str) -> str:
    """a or an."""
    return "an" if text[0] in "aeiou" and not text.startswith("uni") else "a"


def _say_part(part: str, word: str, inner: str) -> str:
    if part == "hair":
        return f"{word} hair"  # hair takes no article
    return f"{inner}{word} {part}"


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def vocabulary() -> list[str]:
    """Every word that an expression or a caption can contain, in alphabetical order."""
    words = {*COLORS, *HAIR, *PATTERNS, *nouns(), "a", "an", "the", "in", "with", "and", "of", "photo", "picture"}
    words |= {"standing", "two", "three", "many", "there", "is", "corner"}
    for category, of_category in drawings().items():
        words.add(plural(category))
        words |= {paint for drawing in of_category for paint in drawing.paints}
    words |= set(supercategories())
    for table in (_POSITION_WORDS, _RELATION_WORDS, _SIZE_WORDS):
        words |= {word for options in table.values() for option in options for word in option.split()}
    words -= {"main", "skin"}
    return sorted({part for word in words for part in word.split()})


def nouns() -> set[str]:
    """Every word that names the thing that an expression is about."""
    return {*GROUPS, *(noun for category in drawings() for noun in nouns_of(category))}


def plural(noun: str) -> str:
    """The plural of a category's name."""
    irregular = {"man": "men", "woman": "women"}
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
