"""VGPhraseCut: phrases that may mean several objects at once, for evaluation only.

`refer_<split>.json` is a list of tasks. A task is a phrase about an image, with the polygons of all instances
that it means. Two sets are reported: *All*, and *Unseen*, the tasks whose category is none of COCO's 80.

The dataset is that of Wu et al. 2020 (github.com/ChenyunWu/PhraseCutDataset).
"""

import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from wris_lib.data.coco import COCO_NAMES, decode_mask
from wris_lib.data.images import check_present, load_image
from wris_lib.errors import WrisError


@dataclass(frozen=True)
class PhraseCutTask:
    """One phrase with the ground truth. No training code may see one.

    Attributes:
        image_path: the image file, which exists.
        image_id: Visual Genome's.
        task_id: unique in the dataset.
        expression: the phrase.
        category: the noun that the annotators marked in the phrase; empty when they marked none.
    """

    image_path: Path
    image_id: int
    task_id: str
    expression: str
    category: str
    polygons: list[list] = field(repr=False, compare=False)

    @property
    def unseen(self) -> bool:
        """Whether there is a category and COCO has none of that very name: "people" counts as unseen."""
        return bool(self.category) and self.category.lower() not in COCO_NAMES

    @property
    def mask(self) -> Bool[np.ndarray, "H W"]:
        """The pixels of all instances that the phrase means, drawn at each access."""
        width, height = load_image(self.image_path).size
        return decode_mask(self.polygons, height, width)


class PhraseCutEvaluation:
    """The evaluation view of a split.

    Args:
        root: the folder with `refer_<split>.json`.
        split: "val", "test", or "miniv".
        images: the folder with `<image_id>.jpg`; by default `<root>/images`.

    Attributes:
        items: one `PhraseCutTask` a phrase, in the order of the file.

    Raises:
        WrisError: the split or an image is missing; the file is damaged or not what it should be.
    """

    items: list[PhraseCutTask]

    def __init__(self, root: str | Path, split: str, images: str | Path | None = None) -> None:
        root = Path(root)
        images = root / "images" if images is None else Path(images)
        path = root / f"refer_{split}.json"
        if not path.is_file():
            splits = [found.stem.removeprefix("refer_") for found in sorted(root.glob("refer_*.json"))]
            raise WrisError(f"there is no {path}; the splits in {root} are: {', '.join(splits) or 'none'}.")
        try:
            self.items = [
                PhraseCutTask(
                    image_path=images / f"{task['image_id']}.jpg",
                    image_id=task["image_id"],
                    task_id=task["task_id"],
                    expression=task["phrase"],
                    category=(task.get("phrase_structure") or {}).get("name", ""),
                    polygons=[
                        list(chain.from_iterable(polygon)) for instance in task["Polygons"] for polygon in instance
                    ],
                )
                for task in json.loads(path.read_text(encoding="utf-8"))
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WrisError(f"{path} is not in VGPhraseCut's format: {error!r}; download it again.") from error
        check_present({item.image_path for item in self.items}, f"phrasecut:{split}")
