"""Referring expressions in REFER's format: RefCOCO, RefCOCO+, RefCOCOg, and the toy datasets.

A dataset is a folder with two files. `refs(<split_by>).p` is a pickled list of *refs*: a ref is one object
that people referred to, with a few sentences and the split it belongs to. `instances.json` is COCO's: images,
and *all* objects in them with their outlines. A ref names its object by `ann_id`. Every sentence is a sample.

Weak supervision means that outlines must not be used in training. Here that is a matter of types:

* `ReferExpressions` is for training. Its items know an image and an expression, and nothing else is in them.
* `ReferEvaluation` is for measuring. Its items also know the masks, which are drawn each time you ask.

The format, and the rules for split names, come from REFER (Kazemzadeh et al. 2014, Yu et al. 2016;
github.com/lichengunc/refer).
"""

import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from wris_lib.data.coco import Entry, decode_mask, read_instances, wrong_keys
from wris_lib.data.images import ELSEWHERE, check_present
from wris_lib.errors import WrisError


@dataclass(frozen=True)
class Expression:
    """One sentence about one object of an image: all that training may know.

    Attributes:
        image_path: the image file, which exists.
        image_id: the image's id in its dataset.
        ref_id: the object's id; several expressions may share it.
        expression: the sentence, as the dataset cleaned it.
        sent_id: the sentence's id, unique in its dataset.
        kind: what the sentence uses (noun, attribute, part, position, relation, long); None in real datasets.
    """

    image_path: Path
    image_id: int
    ref_id: int
    expression: str
    sent_id: int
    kind: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationItem(Expression):
    """An expression together with the ground truth. No training code may see one.

    Masks are drawn from outlines at each access, since those of a whole split would fill the memory.

    Attributes:
        category: the referent's category name, such as "dog".
        height: of the image, in pixels.
        width: of the image, in pixels.
        annotation: the referent's entry in `instances.json`.
        neighbours: the entries of the image's other objects.
    """

    category: str
    height: int
    width: int
    annotation: Entry = field(repr=False, compare=False)
    neighbours: list[Entry] = field(repr=False, compare=False)

    @property
    def mask(self) -> Bool[np.ndarray, "H W"]:
        """The referent's pixels."""
        return self._draw(self.annotation)

    @property
    def box(self) -> Float[np.ndarray, "4"]:
        """The referent's box as the dataset gives it: x0, y0, x1, y1 in pixels."""
        x, y, width, height = self.annotation["bbox"]
        return np.array([x, y, x + width, y + height], dtype=np.float32)

    @property
    def parts(self) -> dict[str, Bool[np.ndarray, "H W"]]:
        """The referent's visible parts by name, two of one name united; empty in real datasets."""
        masks: dict[str, np.ndarray] = {}
        for part in self.annotation.get("parts", []):
            masks[part["name"]] = self._draw(part) | masks.get(part["name"], False)
        return masks

    @property
    def others(self) -> list[Bool[np.ndarray, "H W"]]:
        """The masks of the image's other objects. COCO's crowds are left out: they are no single objects."""
        return [self._draw(annotation) for annotation in self.neighbours]

    @property
    def twins(self) -> int:
        """How many of the image's other objects have the referent's category."""
        return sum(other["category_id"] == self.annotation["category_id"] for other in self.neighbours)

    def _draw(self, outlined: Entry) -> Bool[np.ndarray, "H W"]:
        return decode_mask(outlined["segmentation"], self.height, self.width)


class ReferExpressions:
    """The training view of a split: images and expressions, no masks, boxes or categories.

    Args:
        root: the folder that holds the datasets.
        dataset: the dataset's folder in it, such as "refcoco", "refcoco+", "refcocog" or "toyref".
        split: "train", "val", "test", "testA" (people) or "testB" (others), whichever the dataset has.
        split_by: which `refs(<split_by>).p` to read. By default the only one, or else "umd" or "unc": the
            splits that papers report, for RefCOCOg and for RefCOCO and RefCOCO+.
        images: the folder with the images. By default `<root>/images/<dataset>` if there is one, or else
            `<root>/images/mscoco/images/train2014`.

    Attributes:
        items: one `Expression` a sentence, in the order of the file.

    Raises:
        WrisError: a folder, a file, an image or the split is missing; a file is damaged or in another format.
    """

    items: list[Expression]

    def __init__(
        self,
        root: str | Path,
        dataset: str,
        split: str,
        split_by: str | None = None,
        images: str | Path | None = None,
    ) -> None:
        samples = _read_samples(Path(root), dataset, split, split_by, images)
        self.items = [Expression(**sample) for sample, _ in samples]


class ReferEvaluation:
    """The evaluation view of a split: as `ReferExpressions`, but its items have masks.

    Attributes:
        items: one `EvaluationItem` a sentence, in the order of the file.
    """

    items: list[EvaluationItem]

    def __init__(
        self,
        root: str | Path,
        dataset: str,
        split: str,
        split_by: str | None = None,
        images: str | Path | None = None,
    ) -> None:
        samples = _read_samples(Path(root), dataset, split, split_by, images)
        self.items = [EvaluationItem(**sample, **truth) for sample, truth in samples]


def _read_samples(
    root: Path, dataset: str, split: str, split_by: str | None, images: str | Path | None
) -> Iterator[tuple[Entry, Entry]]:
    """For every sentence of the split, the fields of an `Expression` and what an `EvaluationItem` adds."""
    folder = root / dataset
    if not folder.is_dir():
        raise WrisError(f"there is no dataset folder {folder}; check the root and the dataset's name.")
    image_folder = _find_images(root, dataset, images)
    refs = _select(_read_refs(_find_refs(folder, split_by)), dataset, split)
    instances = read_instances(folder / "instances.json")

    objects_of = defaultdict(list)
    for annotation in instances["annotations"].values():
        if not annotation.get("iscrowd"):
            objects_of[annotation["image_id"]].append(annotation)
    try:
        referents = [instances["annotations"][ref["ann_id"]] for ref in refs]
        categories = [instances["categories"][referent["category_id"]]["name"] for referent in referents]
        pictures = [instances["images"][ref["image_id"]] for ref in refs]
    except KeyError as error:
        raise WrisError(
            f"instances.json in {folder} lacks id {error}, which its refs speak of; download both together."
        ) from error
    # A ref has a file_name of its own, but RefCOCO's is not the name on disk.
    check_present({image_folder / picture["file_name"] for picture in pictures}, f"{dataset}:{split}")

    for ref, referent, category, picture in zip(refs, referents, categories, pictures, strict=True):
        truth = {
            "category": category,
            "height": picture["height"],
            "width": picture["width"],
            "annotation": referent,
            "neighbours": [other for other in objects_of[ref["image_id"]] if other is not referent],
        }
        for sentence in ref["sentences"]:
            sample = {
                "image_path": image_folder / picture["file_name"],
                "image_id": ref["image_id"],
                "ref_id": ref["ref_id"],
                "expression": sentence["sent"],
                "sent_id": sentence["sent_id"],
                "kind": sentence.get("kind"),
            }
            yield sample, truth


def _find_images(root: Path, dataset: str, images: str | Path | None) -> Path:
    places = [root / "images" / dataset, root / "images" / "mscoco" / "images" / "train2014"]
    if images is not None:
        places = [Path(images)]
    for place in places:
        if place.is_dir():
            return place
    raise WrisError(
        f"there is no image folder {' or '.join(map(str, places))}; put the images of {dataset} there {ELSEWHERE}."
    )


def _find_refs(folder: Path, split_by: str | None) -> Path:
    found = {path.name[len("refs(") : -len(").p")]: path for path in sorted(folder.glob("refs(*).p"))}
    if not found:
        raise WrisError(f"there is no refs(...).p in {folder}; download the dataset again.")
    if split_by is None and len(found) == 1:
        return next(iter(found.values()))
    if split_by is None:
        split_by = "umd" if "umd" in found else "unc"
    if split_by not in found:
        raise WrisError(f"there is no refs({split_by}).p in {folder}; split_by can be {' or '.join(found)}.")
    return found[split_by]


def _select(refs: list[Entry], dataset: str, split: str) -> list[Entry]:
    """The refs of a split. As in REFER, testA is every test split with an A in it; test is all of them."""
    letter = split.removeprefix("test")
    if split.startswith("test") and len(letter) <= 1:
        chosen = [ref for ref in refs if ref["split"].startswith("test") and letter in ref["split"]]
    else:
        chosen = [ref for ref in refs if ref["split"] == split]
    if not chosen:
        splits = ", ".join(sorted({ref["split"] for ref in refs})) or "none, since its list of refs is empty"
        raise WrisError(f"{dataset} has no split {split!r}; its splits are: {splits}.")
    return chosen


class _ContainersOnly(pickle.Unpickler):
    """An unpickler that builds lists, dicts, tuples, sets, strings and numbers, and refuses everything else.

    A pickle is a program: what it names is imported and called, `os.system` as readily as `list`. Refs come
    from the internet, and of the types in them only sets are written by name.
    """

    def find_class(self, module: str, name: str) -> type:
        containers = {"set": set, "frozenset": frozenset}
        if module in ("builtins", "__builtin__") and name in containers:  # the latter is Python 2's
            return containers[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of expressions needs")


def _read_refs(path: Path) -> list[Entry]:
    try:
        with open(path, "rb") as file:
            refs = _ContainersOnly(file, encoding="utf-8").load()  # the encoding is for Python 2's byte strings
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WrisError(
            f"{path} cannot be read as a list of refs ({reason}); download it again, from a source that you trust."
        ) from error
    if not isinstance(refs, list):
        raise WrisError(f"{path} should hold a list of refs, but it holds a {type(refs).__name__}.")
    ref_types = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    for number, ref in enumerate(refs):
        wrong = wrong_keys(ref, ref_types)
        for sentence in [] if wrong else ref["sentences"]:
            wrong += wrong_keys(sentence, {"sent_id": int, "sent": str})
        if wrong:
            raise WrisError(f"{path} is not in REFER's format: ref number {number} has no good {wrong[0]!r}.")
    return refs
