"""What can be said of a scene, and the solver that knows what each phrase refers to.

An expression is a small tree, a `Phrase`: a noun with optional attribute, part, position and relation to another
phrase. `truth` says of every object in a scene whether the phrase holds: True, False, or None where people would
disagree (a dog that is just a little left of the middle). A phrase refers to an object when it holds for this one and
clearly for no other; only such phrases become expressions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from wris_lib.data.toyworld.scenes import SIZE, UNSEEN, Scene, SceneObject
from wris_lib.data.toyworld.sprites import PATTERNS

KINDS = ("noun", "attribute", "part", "position", "relation", "long")
SYNONYMS = {"man": ("guy",), "woman": ("lady",), "dog": ("puppy",), "bicycle": ("bike",), "cup": ("mug",)}
GROUPS = {"kid": ("boy", "girl")}
MIN_AREA = 260  # visible pixels of an object that may be spoken of
MIN_PART_AREA = 60
MIN_VISIBLE = 0.5


@dataclass(frozen=True)
class Phrase:
    """A noun phrase.

    Attributes:
        noun: a category, a synonym, or a group such as "kid".
        adjectives: colour of the whole ("red"), pattern ("striped") or size ("big"), in spoken order.
        parts: (part, colour word or pattern) pairs: "with the red roof", "in the striped shirt".
        position: a key of POSITIONS, or "".
        relation: a key of RELATIONS, or "".
        landmark: what the relation is to.
    """

    noun: str
    adjectives: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    position: str = ""
    relation: str = ""
    landmark: "Phrase | None" = None

    @property
    def kind(self) -> str:
        """One of KINDS: what a reader has to understand to find the referent."""
        features = [bool(self.adjectives), bool(self.parts), bool(self.position), bool(self.relation)]
        nested = self.landmark is not None and (self.landmark.parts or self.landmark.relation)
        if sum(features) + len(self.parts) > 3 or nested or (self.relation and sum(features) > 1):
            return "long"
        for name, present in zip(("relation", "position", "part", "attribute"), reversed(features), strict=True):
            if present:
                return name
        return "noun"


# ---------------------------------------------------------------------------------------------------- what is true

POSITIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
    "middle": (0, 0),
}
SPATIAL = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
RELATIONS = (*SPATIAL, "next to", "in front of", "behind")


def truth(phrase: Phrase, scene: Scene) -> list[bool | None]:
    """For each object: does the phrase hold? None where it can't be said clearly."""
    things = scene.objects
    values: list[bool | None] = []
    for thing in things:
        if thing.area < 40:
            values.append(False)  # hidden
            continue
        checks = [_is_called(thing, phrase.noun)]
        checks += [_has_adjective(thing, word) for word in phrase.adjectives if word not in ("big", "small")]
        checks += [_has_part(thing, part, word) for part, word in phrase.parts]
        values.append(_all(checks))
    for word in phrase.adjectives:
        if word in ("big", "small"):
            values = _compare_sizes(things, values, word)
    if phrase.relation:
        landmarks = truth(phrase.landmark, scene)
        if None in landmarks or landmarks.count(True) != 1:
            return [None if value else value for value in values]  # "the car" must be one car
        values = [
            _all([value, _related(things, index, phrase.relation, landmarks.index(True))])
            for index, value in enumerate(values)
        ]
    if phrase.position:
        values = _compare_positions(things, values, phrase.position)
    return values


def referent(phrase: Phrase, scene: Scene) -> int | None:
    """The one object that the phrase refers to, or None when there is none, more than one, or doubt."""
    values = truth(phrase, scene)
    if values.count(True) != 1 or None in values:
        return None
    return values.index(True)


@cache
def nouns_of(category: str) -> tuple[str, ...]:
    """Every word that can stand for the category, its own name first."""
    groups = tuple(group for group, members in GROUPS.items() if category in members)
    return (category, *SYNONYMS.get(category, ()), *groups)


def _is_called(thing: SceneObject, noun: str) -> bool:
    return noun in nouns_of(thing.category)


def _has_adjective(thing: SceneObject, word: str) -> bool:
    if word in PATTERNS:
        return thing.pattern == word
    if word == "blond":
        return thing.colors.get("hair") == word
    return thing.colors.get("main") == word


def _has_part(thing: SceneObject, part: str, word: str) -> bool | None:
    area = thing.part_areas.get(part, 0)
    matches = thing.colors.get(part) == word or (part == "shirt" and thing.pattern == word)
    if part not in thing.present or not matches:
        return False
    return True if area >= MIN_PART_AREA else None  # it is there, but hardly seen


def _compare_sizes(things: list[SceneObject], values: list[bool | None], word: str) -> list[bool | None]:
    candidates = [index for index, value in enumerate(values) if value is not False]
    if len(candidates) < 2:
        return [None if value else value for value in values]  # big compared with what?
    sign = 1 if word == "big" else -1
    sizes = {index: things[index].height * things[index].height * things[index].drawing.aspect for index in candidates}
    ranked = sorted(candidates, key=lambda index: -sign * sizes[index])
    first, second = sizes[ranked[0]], sizes[ranked[1]]
    clear = max(first, second) > 1.7 * min(first, second)
    return [
        value if value is False else (None if not clear else _all([value, index == ranked[0]]))
        for index, value in enumerate(values)
    ]


def _compare_positions(things: list[SceneObject], values: list[bool | None], position: str) -> list[bool | None]:
    """Positions are spoken of the picture and among those that the rest of the phrase fits."""
    candidates = [index for index, value in enumerate(values) if value is not False]
    direction = np.array(POSITIONS[position])
    centers = {index: _center(things[index]) / SIZE - 0.5 for index in candidates}
    result: list[bool | None] = []
    for index, value in enumerate(values):
        if value is False:
            result.append(False)
            continue
        others = [centers[other] for other in candidates if other != index]
        here = centers[index]
        if position == "middle":
            inside = np.abs(here).max() < 0.16 or (abs(here[0]) < 0.12 and bool(others))
            rivals = [np.abs(other[0]) < 0.22 for other in others]
            holds = True if inside and not any(rivals) else (False if abs(here[0]) > 0.26 else None)
        else:
            along = here * direction
            needed = direction != 0
            inside = (along[needed] > (-0.02 if others else 0.12)).all()
            ahead = [((here - other) * direction)[needed].max() > 0.1 for other in others]
            not_behind = [((here - other) * direction)[needed].min() > -0.06 for other in others]
            outside = (along[needed] < -0.08).any()
            beaten = any(((other - here) * direction)[needed].min() > 0.1 for other in others)
            holds = True if inside and all(ahead) and all(not_behind) else (False if outside or beaten else None)
        result.append(_all([value, holds]))
    return result


def _related(things: list[SceneObject], index: int, relation: str, landmark: int) -> bool | None:
    if index == landmark:
        return False
    thing, other = things[index], things[landmark]
    offset = (_center(thing) - _center(other)) / SIZE
    gap = _gap(thing.box, other.box) / SIZE
    if relation == "next to":
        return True if gap < 0.08 else (False if gap > 0.14 else None)
    if relation in SPATIAL:
        direction = np.array(SPATIAL[relation])
        along, across = float(offset @ direction), float(np.abs(offset @ direction[::-1]))
        if along > 0.1 and across < along:
            return True if gap < 0.3 else None
        return False if along < 0.03 or across > 1.6 * along else None
    # Objects are painted from back to front: whoever overlaps and is painted later stands in front.
    nearer, farther = (index, landmark) if relation == "in front of" else (landmark, index)
    if gap > 0.02:
        return False if gap > 0.06 else None
    foot = (things[nearer].box[3] - things[farther].box[3]) / SIZE
    return True if nearer > farther and foot > 0.03 else (False if nearer < farther else None)


def _center(thing: SceneObject) -> np.ndarray:
    left, top, right, bottom = thing.box
    return np.array([(left + right) / 2, (top + bottom) / 2])


def _gap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    horizontal = max(a[0] - b[2], b[0] - a[2], 0)
    vertical = max(a[1] - b[3], b[1] - a[3], 0)
    return float(max(horizontal, vertical))


def _all(values: list[bool | None]) -> bool | None:
    if any(value is False for value in values):
        return False
    return None if any(value is None for value in values) else True


# ------------------------------------------------------------------------------------------------ what can be said


def describe(scene: Scene, index: int, kind: str, rng: np.random.Generator) -> Phrase | None:
    """A phrase of the given kind that refers to object `index` and to nothing else, or None after a fair search."""
    if not can_be_referent(scene.objects[index]):
        return None
    for phrase in _candidates(scene, index, kind, rng):
        if phrase.kind == kind and not _says_twice(phrase) and referent(phrase, scene) == index:
            return phrase
    return None


def _says_twice(phrase: Phrase) -> bool:
    """ "The blond girl with blond hair"."""
    return "blond" in phrase.adjectives and ("hair", "blond") in phrase.parts


def can_be_referent(thing: SceneObject) -> bool:
    """Large and visible enough that a person would speak of it."""
    return thing.area >= MIN_AREA and thing.visible >= MIN_VISIBLE


def _candidates(scene: Scene, index: int, kind: str, rng: np.random.Generator) -> Iterator[Phrase]:
    thing = scene.objects[index]
    noun = pick_noun(thing, rng)
    bare = Phrase(noun)
    qualified = [replace(bare, adjectives=(word,)) for word in adjectives(thing)]
    parts = [replace(bare, parts=(part,)) for part in said_parts(thing)]
    if kind == "noun":
        yield bare
    elif kind == "attribute":
        yield from _shuffled(qualified, rng)
    elif kind == "part":
        yield from _shuffled(parts, rng)
        yield from (replace(p, parts=(p.parts[0], other)) for p in parts for other in said_parts(thing)[:3])
    elif kind == "position":
        bases = [bare, bare, *qualified[:1], *parts[:1]]
        for position in _shuffled(list(POSITIONS), rng):
            yield replace(bases[int(rng.integers(len(bases)))], position=position)
    elif kind == "relation":
        for relation, landmark in _landmarks(scene, index, rng):
            yield replace(bare, relation=relation, landmark=landmark)
    elif kind == "long":
        bases = _shuffled([*qualified, *parts, bare], rng)
        for relation, landmark in _landmarks(scene, index, rng):
            if rng.random() < 0.2:
                landmark = _enriched(scene, landmark, rng)
            yield from (replace(base, relation=relation, landmark=landmark) for base in bases)
        for base in _shuffled(parts, rng):
            more = [part for part in said_parts(thing) if part not in base.parts]
            for adjective in [(), *((word,) for word in adjectives(thing))]:
                for part in more:
                    yield replace(base, adjectives=adjective, parts=(*base.parts, part))


def _landmarks(scene: Scene, index: int, rng: np.random.Generator) -> Iterator[tuple[str, Phrase]]:
    pairs = [
        (relation, other)
        for other in range(len(scene.objects))
        for relation in RELATIONS
        if other != index
        and can_be_referent(scene.objects[other])
        and scene.objects[other].category not in UNSEEN
        and _related(scene.objects, index, relation, other)
    ]
    # Left and right would otherwise crowd out the rest: nearly every pair of objects has them.
    pairs = [pair for pair in pairs if pair[0] not in ("left of", "right of") or rng.random() < 0.5]
    for relation, other in _shuffled(pairs, rng):
        for kind in ("noun", "attribute", "part"):
            landmark = describe(scene, other, kind, rng)
            if landmark is not None:
                yield relation, landmark
                break


def _enriched(scene: Scene, phrase: Phrase, rng: np.random.Generator) -> Phrase:
    """The same referent with one more property, for long sentences."""
    thing = scene.objects[referent(phrase, scene)]
    richer = [replace(phrase, parts=(part,)) for part in said_parts(thing) if not phrase.parts]
    richer += [replace(phrase, adjectives=(word,)) for word in adjectives(thing) if not phrase.adjectives]
    richer = [other for other in richer if not _says_twice(other) and referent(other, scene) is not None]
    return _shuffled(richer, rng)[0] if richer else phrase


def pick_noun(thing: SceneObject, rng: np.random.Generator) -> str:
    """The object's category, or now and then another word for it."""
    nouns = nouns_of(thing.category)
    return nouns[0] if rng.random() < 0.75 else nouns[int(rng.integers(len(nouns)))]


def adjectives(thing: SceneObject) -> list[str]:
    """Adjectives that may fit: its colour and pattern do, whether it is big or small depends on the others."""
    words = []
    if "main" in thing.colors:
        words = [thing.colors["main"], *([thing.pattern] if thing.pattern != "plain" else [])]
    elif thing.colors.get("hair") == "blond":
        words = ["blond"]
    return [*words, "big", "small"]


def said_parts(thing: SceneObject) -> list[tuple[str, str]]:
    """(part, colour word or pattern) of every part that is seen well enough to be spoken of."""
    said = [
        (paint, word)
        for paint, word in thing.colors.items()
        if paint not in ("main", "skin") and thing.part_areas.get(paint, 0) >= MIN_PART_AREA
    ]
    if thing.pattern != "plain" and thing.part_areas.get("shirt", 0) >= MIN_PART_AREA:
        said.append(("shirt", thing.pattern))
    return said


def _shuffled(items: list, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]
