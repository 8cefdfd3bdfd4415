"""What the toy models are trained on: images with captions for CLIP and ALBEF, with class-agnostic masks for SAM.

These scenes are made for pretraining alone: their seeds differ from those of every dataset. Pixels lie in flat files
that are mapped into memory, so a training step reads only what it needs.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wris_lib.data.toyworld import grammar, wording
from wris_lib.data.toyworld.build import VERSION, run_parallel
from wris_lib.data.toyworld.scenes import MAX_OBJECTS, SIZE, Scene, sample_object_image, sample_scene
from wris_lib.data.toyworld.sprites import COLORS, drawings
from wris_lib.files import atomic_folder, cache_dir, write_json

SEED = 1009
CAPTIONS = 6  # an image
# Images, pixels a side. Seeds depend on a pool's place in this table.
POOLS = {"clip": (40_000, 128), "sam": (12_000, 256), "clip-fine": (40_000, 192), "albef": (24_000, 256)}


@dataclass(frozen=True)
class Pool:
    """Images for pretraining.

    The first half of CLIP's are object-centric, the rest are scenes. ALBEF's get harder: a third is object-centric, a
    third are scenes of two or three objects, the last third are scenes of any number.

    Attributes:
        images: RGB, 0..255.
        labels: for masks: 0 = background, else 16 · (object index + 1) + part index.
        captions: for CLIP and ALBEF: several true sentences an image.
        untrue: for ALBEF: sentences that differ from an image's captions in a word or two, and are not true of it.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: UInt8[np.ndarray, "n h w"] | None
    captions: list[list[str]] | None
    untrue: list[list[str]] | None = None


def pool(name: str) -> Pool:
    """One of `POOLS`; made in the cache on first use, in a few minutes on two cores."""
    count, size = POOLS[name]
    return make_pool(cache_dir() / f"toyworld-{VERSION}-pool-{name}", name, count, size)


def checkpoint_folder(model: str) -> Path:
    """Where `pretrain MODEL` trains: a folder for each version of the toy world, which no checkpoint names."""
    return cache_dir() / "pretrain" / f"{model}-{VERSION}"


def make_pool(folder: Path, name: str, count: int, size: int, processes: int | None = None) -> Pool:
    """A pool in `folder`, made unless it is there.

    Args:
        name: one of `POOLS`: "sam" has labels, the others have captions, "albef" also untrue ones.
        count: number of images.
        size: pixels a side.
    """
    with atomic_folder(folder) as target:
        if target is not None:
            _write_pool(target, name, count, size, processes)
    shape = (count, size, size)
    images = np.memmap(folder / "images.bin", np.uint8, "r", shape=(*shape, 3))
    if name != "sam":
        sentences = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        kinds = zip(*sentences, strict=True) if name == "albef" else [sentences]
        return Pool(images, None, *(list(kind) for kind in kinds))
    return Pool(images, np.memmap(folder / "labels.bin", np.uint8, "r", shape=shape), None)


def _write_pool(folder: Path, name: str, count: int, size: int, processes: int | None) -> None:
    captions = []
    with open(folder / "images.bin", "wb") as images, open(folder / "labels.bin", "wb") as labels:
        work = partial(_make_item, name, count, size)
        for pixels, label, sentences in run_parallel(work, list(range(count)), f"{name} pool", processes):
            images.write(pixels)
            labels.write(label)
            captions.append(sentences)
    if name != "sam":
        write_json(folder / "captions.json", captions)


def _make_item(name: str, count: int, size: int, number: int) -> tuple[bytes, bytes, list]:
    rng = np.random.default_rng([SEED, list(POOLS).index(name), number])
    object_centric = {"sam": number % 3 == 0, "albef": number < count // 3}.get(name, number < count // 2)
    categories = list(drawings())
    if object_centric:
        scene = sample_object_image(rng, categories[number % len(categories)])
    else:
        scene = sample_scene(rng, most=3 if name == "albef" and number < 2 * count // 3 else MAX_OBJECTS)
    image = Image.fromarray(scene.image)
    if size != SIZE:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    if name == "sam":
        return image.tobytes(), scene.labels.tobytes(), []
    return image.tobytes(), b"", list(statements(scene, rng)) if name == "albef" else captions(scene, rng)


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """CAPTIONS true sentences about a scene, of the kinds that one finds beside pictures."""
    things = [i for i in range(len(scene.objects)) if grammar.can_be_referent(scene.objects[i])]
    sentences = []
    for number in range(CAPTIONS):
        if not things:
            sentences.append(_enumerate(scene, rng))
        elif len(scene.objects) == 1:
            sentences.append(_describe_one(scene, 0, rng))
        elif number % 3 == 0:
            sentences.append(_enumerate(scene, rng))
        else:
            index = things[int(rng.integers(len(things)))]
            kinds = ("relation", "long", "position", "part") if number % 3 == 1 else ("part", "attribute", "position")
            kind = kinds[int(rng.integers(len(kinds)))]
            phrase = grammar.describe(scene, index, kind, rng)
            sentences.append(_say(phrase, rng) if phrase else _describe_one(scene, index, rng))
    return sentences


def statements(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Up to CAPTIONS sentences, each about one thing of a scene, and as many untrue ones that are nearly the same."""
    things = [i for i in range(len(scene.objects)) if grammar.can_be_referent(scene.objects[i])]
    true, untrue = [], []
    for _ in range(CAPTIONS if things else 0):
        index = things[int(rng.integers(len(things)))]
        kind = grammar.KINDS[int(rng.integers(len(grammar.KINDS)))]
        if (phrase := grammar.describe(scene, index, kind, rng)) and (other := deny(scene, phrase, rng)):
            short = bool(rng.random() < 0.4)
            seed = int(rng.integers(2**32))  # of the wording: it shall be the same but in one place
            for said, which in ((true, phrase), (untrue, other)):
                said.append(wording.say(which, np.random.default_rng(seed), telegraphic=short))
    return true, untrue


def deny(scene: Scene, phrase: grammar.Phrase, rng: np.random.Generator) -> grammar.Phrase | None:
    """A phrase that differs in one place and clearly fits nothing in the scene, or None after a fair search.

    The other word is often one that something else in the scene would deserve: "the red car" where car and roof are
    there, and the roof is red.
    """
    for _ in range(12):
        other = _altered(scene, phrase, rng)
        if all(value is False for value in grammar.truth(other, scene)):
            return other
    return None


def _altered(scene: Scene, phrase: grammar.Phrase, rng: np.random.Generator) -> grammar.Phrase:
    """The phrase with another noun, colour, position, relation or landmark."""
    present = bool(rng.random() < 0.5)
    things = [t for t in scene.objects if t.area >= grammar.MIN_AREA]

    def color(old: str) -> str:
        seen = [c for t in things for c in t.colors.values() if c in COLORS and c != old]
        options = seen if present and seen else [c for c in COLORS if c != old]
        return options[int(rng.integers(len(options)))]

    # "The bus in the brown shirt" would be known for untrue without a look.
    said = {part for part, _ in phrase.parts}
    nouns = [name for name, variants in drawings().items() if any(said <= set(v.paints) for v in variants)]
    here = [t.category for t in things if t.category in nouns]
    nouns = here if present and here else nouns
    options = [replace(phrase, noun=nouns[int(rng.integers(len(nouns)))])] if nouns else [phrase]
    if any(word in COLORS for word in phrase.adjectives):
        options.append(replace(phrase, adjectives=tuple(color(w) if w in COLORS else w for w in phrase.adjectives)))
    if phrase.parts:
        (part, word), *rest = phrase.parts
        options.append(replace(phrase, parts=((part, color(word)), *rest)))
    if phrase.position:
        places = [p for p in grammar.POSITIONS if p != phrase.position]
        options += 2 * [replace(phrase, position=places[int(rng.integers(len(places)))])]
    if phrase.relation:
        relations = [r for r in grammar.RELATIONS if r != phrase.relation]
        options.append(replace(phrase, relation=relations[int(rng.integers(len(relations)))]))
        options.append(replace(phrase, landmark=_altered(scene, phrase.landmark, rng)))
    return options[int(rng.integers(len(options)))]


def _describe_one(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """One object by what can be seen of it, whether or not that is unique."""
    thing = scene.objects[index]
    noun = grammar.pick_noun(thing, rng)
    adjectives = [word for word in grammar.adjectives(thing) if word not in ("big", "small")]
    keep = tuple(word for word in adjectives if rng.random() < 0.6)
    parts = [part for part in grammar.said_parts(thing) if rng.random() < 0.5]
    order = rng.permutation(len(parts))[:3]
    phrase = grammar.Phrase(noun, keep, tuple(parts[i] for i in order))
    text = _say(phrase, rng)
    if len(scene.objects) == 1 and rng.random() < 0.25:
        text += " in the middle"
    return text


def _enumerate(scene: Scene, rng: np.random.Generator) -> str:
    """What is there: "a red car, two dogs and a tree"."""
    seen: dict[str, list[int]] = {}
    for index, thing in enumerate(scene.objects):
        if thing.area >= grammar.MIN_AREA:
            seen.setdefault(thing.category, []).append(index)
    names = []
    for category, indices in seen.items():
        words = grammar.adjectives(scene.objects[indices[0]])[:1] if len(indices) == 1 else []
        color = [w for w in words if w not in ("big", "small") and rng.random() < 0.6]
        count = {1: "", 2: "two ", 3: "three "}.get(len(indices), "many ")
        noun = " ".join([*color, category if len(indices) == 1 else wording.plural(category)])
        names.append(count + noun if count else f"{wording.article_for(noun)} {noun}")
    names = [names[i] for i in rng.permutation(len(names))][:4]
    if not names:
        return "a picture"
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _say(phrase: grammar.Phrase, rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.35:
        return wording.say(phrase, rng, article="the")
    if draw < 0.5:
        return wording.say(phrase, rng, telegraphic=True)
    prefix = ("", "", "a photo of ", "there is ")[int(rng.integers(4))]
    return prefix + wording.say(phrase, rng, article="a")
