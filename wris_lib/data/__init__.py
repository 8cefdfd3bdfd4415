"""What comes in: referring datasets, object-centric folders, the toy world, and single images.

A split is named `dataset:split`, such as "toyref:val" or "refcoco:testA". Toy datasets are made in the cache on first
use; real ones are looked for under `$WRIS_DATA`, by default the folder `data` in the cache, where `fetch` puts them.
"""

from pathlib import Path

from wris_lib.data.refer import ReferEvaluation, ReferExpressions
from wris_lib.download import FETCH
from wris_lib.errors import WrisError
from wris_lib.files import data_dir


def load(spec: str) -> ReferEvaluation:
    """A split with its ground truth, to measure on.

    Args:
        spec: `dataset:split`, such as "toyref:val".

    Raises:
        WrisError: the name has another form, or the dataset or split is not there.
    """
    return ReferEvaluation(*_find(spec))


def load_training(spec: str) -> ReferExpressions:
    """A split without masks, boxes or categories, to train on.

    Args:
        spec: `dataset:split`, such as "toyref:train".

    Raises:
        WrisError: the name has another form, or the dataset or split is not there.
    """
    return ReferExpressions(*_find(spec))


def _find(spec: str) -> tuple[Path, str, str]:
    from wris_lib.data import toyworld  # takes a moment to import, and real data do not need it

    dataset, colon, split = spec.partition(":")
    if not (dataset and colon and split):
        raise WrisError(f"{spec!r} names no split; write dataset:split, such as toyref:val.")
    if dataset in toyworld.DATASETS:
        return toyworld.ensure(), dataset, split
    root = data_dir()
    if not (root / dataset).is_dir():
        raise WrisError(
            f"there is no dataset {dataset!r} in {root}; the toy datasets are {', '.join(toyworld.DATASETS)}, and real"
            f" ones belong into that folder or the one that WRIS_DATA names, where `{FETCH} --data refcoco` puts them."
        )
    return root, dataset, split
