"""Sentences of the toy world, each with what a grammar book would say of it: what the toy parser learns from.

A `Phrase` of the toy world's own grammar is drawn and put into words, as for every expression, though no scene has to
show it. The toy language can be read word by word without doubt, so `analyse` knows the part of speech of every word
and what it depends on. Labels are those of spaCy's English pipelines (universal parts of speech, ClearNLP's
dependencies), for which spaCy's rules for noun phrases are written.

A parser that has seen nothing but two hundred words believes anything of the next one. So `exchange_words` puts other
articles and prepositions into a sentence, and nouns, adjectives and verbs that do not exist, of which only the ending
and the neighbours tell what they are.
"""

from dataclasses import dataclass, replace

import numpy as np

from wris_lib.data.toyworld import wording
from wris_lib.data.toyworld.grammar import POSITIONS, RELATIONS, Phrase, nouns_of
from wris_lib.data.toyworld.sprites import COLORS, HAIR, PATTERNS, colors_of, drawings, supercategories

NAMES = sorted({noun for category in drawings() for noun in nouns_of(category)})
PARTS = sorted({part for of_category in drawings().values() for drawing in of_category for part in drawing.paints})
PARTS = [part for part in PARTS if part not in ("main", "skin")]
PLURALS = [wording.plural(category) for category in drawings()]
SIDES = ("left", "right", "top", "bottom")  # adjectives in "the left dog", nouns in "on the left"
PLACES = ("side", "corner", "middle", "center", "front", "photo", "picture")
CLASSES = {
    "NOUN": (*NAMES, *PLURALS, *supercategories(), *PARTS, *PLACES),
    "ADJ": (*COLORS, *HAIR, *PATTERNS, "big", "large", "small", "little", "many"),
    "DET": ("a", "an", "the"),
    "ADP": ("in", "with", "on", "at", "of", "to", "above", "over", "below", "under", "beside", "near", "behind"),
    "NUM": ("two", "three"),
    "ADV": ("next",),
    "VERB": ("standing",),
    "CCONJ": ("and",),
    "PRON": ("there",),
    "AUX": ("is",),
    "PUNCT": (",", "."),
}
UPOS = {word: upos for upos, words in CLASSES.items() for word in words}


@dataclass(frozen=True)
class Analysis:
    """A sentence and what is known of it: the arguments of spaCy's `Doc`.

    Attributes:
        words: its words and punctuation marks.
        spaces: whether a space follows.
        pos: universal parts of speech.
        heads: index of the word that each depends on; its own for the root.
        deps: what each is to its head.
    """

    words: list[str]
    spaces: list[bool]
    pos: list[str]
    heads: list[int]
    deps: list[str]

    @property
    def text(self) -> str:
        return "".join(word + " " * space for word, space in zip(self.words, self.spaces, strict=True))


def draw_sentence(rng: np.random.Generator) -> str:
    """An expression, or one in five times a caption: "there is …", "a photo of …", "two dogs and a red car"."""
    form = rng.random()
    if form < 0.8:
        article = "the" if rng.random() < 0.7 else "a"
        return wording.say(draw_phrase(rng), rng, article, telegraphic=bool(rng.random() < 0.5))
    if form < 0.9:
        return str(rng.choice(["there is", "a photo of"])) + " " + wording.say(draw_phrase(rng), rng, article="a")
    named = [wording.say(Phrase(str(rng.choice(NAMES)), _adjectives(rng)), rng, article="a") for _ in range(2)]
    counted = [f"{rng.choice(['two', 'three', 'many'])} {rng.choice(PLURALS)}" for _ in range(2)]
    listed = [str(item) for item in rng.permutation(named + counted)[: rng.integers(1, 5)]]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def draw_phrase(rng: np.random.Generator, landmarks: int = 1) -> Phrase:
    """Any phrase that the grammar can form, whether or not there is such a thing.

    Args:
        landmarks: how deep relations may nest.
    """
    chosen = rng.choice(PARTS, rng.choice([0, 1, 2, 3], p=[0.55, 0.25, 0.15, 0.05]), replace=False).tolist()
    parts = [(part, str(rng.choice([*colors_of(part), *(PATTERNS[1:] if part == "shirt" else ())]))) for part in chosen]
    phrase = Phrase(str(rng.choice(NAMES)), _adjectives(rng), tuple(parts))
    if rng.random() < 0.35:
        phrase = replace(phrase, position=str(rng.choice(list(POSITIONS))))
    if landmarks and rng.random() < 0.35:
        phrase = replace(phrase, relation=str(rng.choice(RELATIONS)), landmark=draw_phrase(rng, landmarks - 1))
    return phrase


def _adjectives(rng: np.random.Generator) -> tuple[str, ...]:
    options = [("big", "small"), (*COLORS, *HAIR), PATTERNS[1:]]
    return tuple(str(rng.choice(words)) for words in options if rng.random() < 0.25)


def analyse(text: str) -> Analysis:
    """The one reading of a sentence of the toy world.

    Raises:
        KeyError: it contains a word that the toy world does not know.
    """
    pieces = text.replace(",", " ,").split()
    spaces = [following != "," for following in pieces[1:]] + [False]
    pos = [_upos(pieces, i) for i in range(len(pieces))]
    heads, deps = [0] * len(pieces), [""] * len(pieces)

    def attach(i: int, head: int, dep: str) -> None:
        heads[i], deps[i] = head, dep

    waiting: list[int] = []  # articles, numbers and adjectives, for their noun
    governor, role = None, "ROOT"  # of the next noun
    noun = entity = 0  # the last noun, and the last that names a thing: clauses say something of that
    for i, (word, upos) in enumerate(zip(pieces, pos, strict=True)):
        topic = i - 1 if i and pos[i - 1] == "VERB" else entity  # what a clause that begins here tells of
        if upos in ("DET", "NUM") or upos == "ADJ" and not _follows_its_noun(pieces, i):
            waiting.append(i)
        elif upos == "NOUN":
            for j in waiting:
                attach(j, i, {"DET": "det", "NUM": "nummod", "ADJ": "amod"}[pos[j]])
            attach(i, i if governor is None else governor, role)
            waiting, governor, role, noun = [], i, "conj", i
            entity = i if word in NAMES else entity
        elif upos == "ADP":
            attach(i, i - 1 if word == "of" or pos[i - 1] == "ADV" else topic, "prep")  # "left of", "next to"
            governor, role = i, "pobj"
        elif upos == "ADV":
            attach(i, topic, "advmod")
        elif upos == "ADJ":
            attach(i, topic, "amod" if topic == entity else "acomp")
        elif upos == "VERB":
            attach(i, entity, "acl")
        elif upos == "AUX":
            attach(i, i, "ROOT")
            governor, role = i, "attr"
        elif upos == "PRON":
            attach(i, i + 1, "expl")
        else:
            attach(i, noun, {"CCONJ": "cc", "PUNCT": "punct"}[upos])
    return Analysis(pieces, spaces, pos, heads, deps)


def _upos(words: list[str], i: int) -> str:
    if words[i] not in SIDES:
        return UPOS[words[i]]
    following = words[i + 1] if i + 1 < len(words) else "."
    qualifies = following in SIDES or UPOS[following] in ("NOUN", "ADJ")
    return "ADJ" if _follows_its_noun(words, i) or qualifies and not _follows_its_noun(words, i + 1) else "NOUN"


def _follows_its_noun(words: list[str], i: int) -> bool:
    """Whether this is the "left" of "the dog left of the car"."""
    return words[i] in ("left", "right") and words[i + 1 : i + 2] == ["of"] and words[i - 1] != "the"


# ---------------------------------------------------------------------------------------------- words never seen before

OTHERS = {
    "DET": ("this", "that", "his", "her", "my", "their", "your", "another"),
    "ADP": ("by", "from", "inside", "against", "across", "through", "into", "for", "along", "beneath", "within"),
}
ENDINGS = {"NOUN": ("", "", "s", "er"), "ADJ": ("", "", "y", "ed"), "VERB": ("ing",)}
KEPT = (*SIDES, "of", "to")  # what they are depends on the very word
EXCHANGED = 0.3  # share of the other words

# A word that does not exist is made of one or two of these, one after the other: "stoub", "mergrea".
ONSETS = ("b", "bl", "c", "ch", "d", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "r", "s", "st", "sh", "t", "w")
VOWELS = ("a", "e", "i", "o", "u", "oo", "ea", "ou")
CODAS = ("", "b", "ck", "d", "l", "m", "n", "r", "rt", "st", "t", "x", "nd", "p")


def exchange_words(analysis: Analysis, rng: np.random.Generator) -> Analysis:
    """The same sentence with some other words of the same kind, now and then with a capital letter or a period."""
    words = list(analysis.words)
    for i, upos in enumerate(analysis.pos):
        if words[i] not in KEPT and rng.random() < EXCHANGED:
            if upos in OTHERS:
                words[i] = str(rng.choice(OTHERS[upos]))
            elif upos in ENDINGS:
                words[i] = _invent(rng) + str(rng.choice(ENDINGS[upos]))
    if rng.random() < 0.2:
        words[0] = words[0].capitalize()
    exchanged = vars(analysis) | {"words": words}
    if rng.random() < 0.2:
        root = next(i for i, head in enumerate(analysis.heads) if head == i)
        period = {"words": ".", "spaces": False, "pos": "PUNCT", "heads": root, "deps": "punct"}
        exchanged = {name: [*exchanged[name], value] for name, value in period.items()}
    return Analysis(**exchanged)


def _invent(rng: np.random.Generator) -> str:
    syllable = (ONSETS, VOWELS, CODAS)
    return "".join(str(rng.choice(letters)) for letters in syllable * int(rng.integers(1, 3)))
