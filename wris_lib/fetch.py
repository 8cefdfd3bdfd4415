"""What `python -m wris_lib fetch` does: say what is lacking and where it comes from, ask, and bring it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from wris_lib.backbones.checkpoints import STACKS, fetch_checkpoint, paper_status
from wris_lib.data import archives
from wris_lib.download import FETCH, Remote
from wris_lib.files import cache_dir, data_dir


def fetch_paper(datasets: Sequence[str] = (), images: Path | None = None, ask: bool = True) -> None:
    """Bring what is lacking of the paper stack, and of real datasets, having said what that is.

    Args:
        datasets: keys of `archives.DATASETS`.
        images: a folder with COCO's train2014, of which only the place is recorded then; None: fetch the pictures.
        ask: wait for a yes on the keyboard first.

    Raises:
        WrisError: no source of a file worked; a folder is read-only or the disk is full; `images` lacks pictures
            that the datasets have. What has arrived is kept.
    """
    if images is not None:
        archives.check_images(images, datasets)
    status = paper_status()
    weights = [checkpoint for checkpoint in STACKS["paper"].checkpoints if status[checkpoint.file] != "ready"]
    data = archives.needed(datasets, images) if datasets else []
    lacking = [archive for archive in data if not archives.is_ready(archive)]
    if lacking:
        archives.check_disk(lacking)
    _announce(cache_dir() / "paper", weights, status)
    _announce(data_dir(), lacking, status)
    if (weights or lacking) and ask and not _agreed("Fetch? [y/N] "):
        print("Nothing was fetched.")
        return
    for checkpoint in weights:
        fetch_checkpoint(checkpoint)
    print(f"The paper stack is complete in {cache_dir() / 'paper'}.")
    command = f"{FETCH} --data {' '.join(datasets)}"
    if images is not None:
        command += f" --images {shlex.quote(str(images))}"
    for archive in data:
        archives.fetch_archive(archive, command)
    _check(datasets, images)


def _announce(folder: Path, lacking: Sequence[Remote], status: dict[str, str]) -> None:
    if lacking:
        print(f"To be fetched into {folder}:")
    for remote in lacking:
        print(f"  {remote.file}: {remote.amount}; licence: {remote.licence}")
        print(f"    from {remote.urls[0]}", *remote.urls[1:], sep="\n    or   ")
        if status.get(remote.file) == "unchecked":
            print("    unless the file that is there turns out to be the same")


def _check(datasets: Sequence[str], images: Path | None) -> None:
    """Read the datasets once, say what is in them, and only then record where the pictures are."""
    for dataset in dict.fromkeys(datasets):
        counts = archives.count_expressions(dataset, images)
        found = ", ".join(f"{count} in {split}" for split, count in counts.items())
        print(f"{dataset} is complete in {data_dir()}; its expressions: {found}.")
    if images is not None:
        archives.link_images(images)


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:  # nobody sits at the keyboard
        print()
        return False
