"""What a grammar book would say of a toy sentence's cues: what the toy language model learns to write.

`analyse` knows what every word of a toy sentence depends on. From that a sentence is taken apart as the paper's example
is: first what the thing is, then each of its properties by itself. Landmarks lose their own properties.

    "big red car in front of man in green shirt"  ->  a car · the big car · the red car · the car in front of the man
"""

from wris_lib.data.toyworld.wording import article_for
from wris_lib.pretrain.sentences import NAMES, PARTS, SIDES, Analysis


def cues(analysis: Analysis, count: int) -> list[str]:
    """At most `count` cues of an expression of the toy world, the most general first."""
    words = analysis.words
    thing = analysis.deps.index("ROOT")
    noun = words[thing]
    adjectives = [words[i] for i in _children(analysis, thing) if i < thing and analysis.pos[i] == "ADJ"]
    place = " ".join(word for word in adjectives if word in SIDES)  # "top left" is one place
    said = [place] * bool(place) + [word for word in adjectives if word not in SIDES]
    clauses = [clause for i in _children(analysis, thing) if i > thing for clause in _clauses(analysis, i)]
    found = [f"{article_for(noun)} {noun}", *(f"the {word} {noun}" for word in said)]
    return [*found, *(f"the {noun} {clause}" for clause in clauses)][:count]


def answer(analysis: Analysis, count: int) -> str:
    """Those cues as the language model writes them, in numbered lines."""
    return "\n".join(f"{number}. {cue}" for number, cue in enumerate(cues(analysis, count), start=1))


def _clauses(analysis: Analysis, head: int) -> list[str]:
    """What a word behind the noun says of it, with all that depends on it; of parts joined by "and" each by itself."""
    children = _children(analysis, head)
    if len(children) == 1 and analysis.words[children[0]] in PARTS:
        parts, listed = [], children
        while listed:  # "and" hangs on the part before it, and so does the part behind it
            parts += listed
            listed = [i for i in _children(analysis, listed[0]) if analysis.deps[i] == "conj"]
        return [f"{analysis.words[head]} {_phrase(analysis, part)}" for part in parts]
    return [_phrase(analysis, head)]


def _phrase(analysis: Analysis, head: int) -> str:
    """A word and what depends on it; a landmark loses its own properties, and articles that were left out come back."""
    word, children = analysis.words[head], _children(analysis, head)
    if word in NAMES:
        return f"the {word}"
    if word in PARTS:
        adjectives = [analysis.words[i] for i in children if analysis.deps[i] == "amod"]
        return " ".join([*([] if word == "hair" else ["the"]), *adjectives, word])
    before = [_phrase(analysis, i) for i in children if i < head]
    after = [_phrase(analysis, i) for i in children if i > head]
    return " ".join([*before, word, *after])


def _children(analysis: Analysis, head: int) -> list[int]:
    return [i for i, parent in enumerate(analysis.heads) if parent == head and i != head]
