"""COCO's `instances.json`, the file beneath every RefCOCO dataset: images and the objects in them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from wris_lib.errors import WrisError

Entry = dict[str, Any]  # one image, annotation or category, as its file has it

_NAMES = """
    person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign
    parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag
    tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard
    tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot
    hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop mouse remote
    keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear
    hair_drier toothbrush
"""
COCO_NAMES = frozenset(name.replace("_", " ") for name in _NAMES.split())  # the 80 categories


def read_instances(path: Path) -> dict[str, dict[int, Entry]]:
    """Read a COCO file. The one read last is kept, for a second split of the same dataset.

    The tables are shared by all who read that file: do not change them.

    Returns:
        Its tables "images", "annotations" and "categories", each as a dict from id to entry.

    Raises:
        WrisError: the file is missing, damaged or in another format.
    """
    try:
        state = path.stat()
    except FileNotFoundError as error:
        raise WrisError(f"there is no {path}; download the dataset again.") from error
    return _parse_instances(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _parse_instances(path: Path, changed: int, size: int) -> dict[str, dict[int, Entry]]:
    """Time of change and size are there for the cache: a file that was written anew is read anew."""
    types = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list, "segmentation": object},
        "categories": {"id": int, "name": str},
    }
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WrisError(f"{path} cannot be read as JSON ({error}); download it again.") from error
    tables = {}
    for table in types:
        entries = content.get(table) if isinstance(content, dict) else None
        if not isinstance(entries, list) or any(wrong_keys(entry, types[table]) for entry in entries):
            raise WrisError(f"{path} is not in COCO's format: {table!r} should have {', '.join(types[table])}.")
        tables[table] = {entry["id"]: entry for entry in entries}
    return tables


def decode_mask(segmentation: list[Any] | Entry, height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
    """Draw the outline of a COCO annotation.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels, or a run-length encoding
            {"size": [H, W], "counts": ...} whose counts are a list of numbers or COCO's compressed string.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The union of the polygons. (Some released code sums the polygons and keeps the pixels that equal 1,
        which cuts a hole where two overlap.)

    Raises:
        WrisError: the outline is damaged or belongs to an image of another size.
    """
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError(f"its size is {segmentation['size']}, but the image's is {[height, width]}")
            compressed = isinstance(segmentation["counts"], str | bytes)
            runs = segmentation if compressed else coco_mask.frPyObjects(segmentation, height, width)
        else:
            polygons = [points for points in segmentation if len(points) >= 6]  # two points enclose nothing
            if not polygons:
                return np.zeros((height, width), dtype=bool)
            runs = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return coco_mask.decode(runs).astype(bool)
    except Exception as error:  # pycocotools raises many kinds, bare Exception among them
        raise WrisError(f"a mask cannot be drawn: {error}; download its dataset again.") from error


def encode_mask(mask: Bool[np.ndarray, "H W"]) -> Entry:
    """A mask as COCO's compressed run-length encoding {"size": [H, W], "counts": "..."}, ready for JSON."""
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}


def wrong_keys(entry: Any, types: dict[str, type]) -> list[str]:
    """The keys that an entry of a downloaded file lacks, or whose values have another type."""
    if not isinstance(entry, dict):
        return list(types)
    return [key for key, kind in types.items() if key not in entry or not isinstance(entry[key], kind)]
