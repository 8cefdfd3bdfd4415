"""RefCOCO, RefCOCO+ and RefCOCOg from where they are published, put where `data.load` looks.

Each dataset is a zip file of sentences and outlines by REFER; the pictures of all three are COCO's train2014. A zip
file is unpacked once its SHA-256 has been compared, and deleted when the folder that it becomes is complete.
"""

import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile, ZipInfo

from tqdm.auto import tqdm

from wris_lib.data.refer import ReferExpressions
from wris_lib.download import Remote, fetch_file
from wris_lib.errors import WrisError
from wris_lib.files import atomic_folder, check_room, data_dir, readable_errors

PICTURES = "COCO_train2014_*.jpg"


@dataclass(frozen=True, kw_only=True)
class Archive(Remote):
    """A zip file, and what becomes of it."""

    folder: str  # what it is unpacked to, in the folder of real datasets
    members: tuple[str, ...]  # patterns of the file names to take out; each must be met
    unpacked: int  # MB, about

    @property
    def amount(self) -> str:
        return f"{super().amount}, unpacked about {self.unpacked} MB"


def _refer(dataset: str, captured: int, sha256: str, megabytes: int, unpacked: int, licence: str) -> Archive:
    """A dataset of REFER's. Its host is gone, but the Internet Archive has copies, by the second of their capture."""
    url = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{dataset}.zip"
    return Archive(
        file=f"{dataset}.zip",
        sha256=sha256,
        urls=(f"https://web.archive.org/web/{captured}id_/{url}", url),
        megabytes=megabytes,
        licence=f"{licence} for the sentences, CC BY 4.0 (COCO) for the outlines",
        folder=dataset,
        members=("instances.json", "refs(*).p"),
        unpacked=unpacked,
    )


# Neither REFER nor COCO publishes hashes. Those of REFER's files are what several projects have found and written down,
# independently of each other; that of COCO's is torchvision's.
DATASETS = {
    "refcoco": _refer(
        "refcoco",
        captured=20220413011718,
        sha256="7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
        megabytes=54,
        unpacked=190,
        licence="Apache-2.0 (REFER)",
    ),
    "refcoco+": _refer(
        "refcoco+",
        captured=20220413011656,
        sha256="5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
        megabytes=46,
        unpacked=160,
        licence="Apache-2.0 (REFER)",
    ),
    "refcocog": _refer(
        "refcocog",
        captured=20220413012904,
        sha256="3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
        megabytes=57,
        unpacked=200,
        licence="CC BY 4.0 (Google)",
    ),
}
TRAIN2014 = Archive(
    file="train2014.zip",
    sha256="ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    # COCO's host has no certificate of its own, hence no https; the second is the same store by another name.
    urls=(
        "http://images.cocodataset.org/zips/train2014.zip",
        "https://s3.amazonaws.com/images.cocodataset.org/zips/train2014.zip",
    ),
    megabytes=13511,
    licence="the photographers', under Flickr's terms of use",
    folder="images/mscoco/images/train2014",
    members=(PICTURES,),
    unpacked=13600,
)


def needed(datasets: Sequence[str], images: Path | None = None) -> list[Archive]:
    """What these datasets consist of, whether it is there or not.

    Args:
        images: a folder that has COCO's pictures; `TRAIN2014` is not needed then.
    """
    archives = [DATASETS[dataset] for dataset in dict.fromkeys(datasets)]
    elsewhere = images is not None or all((data_dir() / "images" / dataset).is_dir() for dataset in datasets)
    return archives if elsewhere else [*archives, TRAIN2014]


def is_ready(archive: Archive) -> bool:
    """Whether it has been unpacked: the folder appears when it is complete."""
    return _place(archive).is_dir()


def data_status() -> dict[str, str]:
    """For each dataset: "ready", "missing", or "begun" (something is there, but not all that it needs)."""
    return {dataset: _status(dataset) for dataset in DATASETS}


def check_disk(archives: Sequence[Archive]) -> None:
    """Make sure that these archives fit on the disk, zip files and what they become, before one is fetched.

    Raises:
        WrisError: they do not, or the folder of real datasets cannot be made.
    """
    with readable_errors(data_dir()):
        data_dir().mkdir(parents=True, exist_ok=True)
    arrived = sum(path.stat().st_size for archive in archives for path in _zip_files(archive))
    check_room(data_dir(), sum(archive.megabytes + archive.unpacked for archive in archives) * 1_000_000 - arrived)


def fetch_archive(archive: Archive, command: str) -> None:
    """Bring an archive and unpack it, unless that has been done.

    Args:
        command: what to run again if it breaks off.

    Raises:
        WrisError: no source worked; the zip file is damaged; the folder is read-only or the disk is full. What has
            arrived is kept.
    """
    place = _place(archive)
    path = place.with_name(archive.file)
    if not is_ready(archive):
        if place.is_symlink():  # to pictures that are gone, see `link_images`
            place.unlink()
        fetch_file(archive, path, archive.sha256, command)
        unpack(path, archive.members, place)
    path.unlink(missing_ok=True)  # also what a run left that was killed just before


def unpack(path: Path, members: Sequence[str], folder: Path) -> None:
    """Take some files out of a zip file into a new folder; all of them or, after a crash, none.

    Of a file's path in the zip only the last part is used: none can name a place outside the folder.

    Args:
        members: patterns of file names; each must be met.

    Raises:
        WrisError: the zip file is damaged or lacks a file; the disk is too small or full.
    """
    with atomic_folder(folder) as temporary:
        if temporary is None:  # another process was faster
            return
        try:
            with ZipFile(path) as archive:
                chosen = [found for member in members for found in _find(archive, member)]
                check_room(folder.parent, sum(found.file_size for found in chosen))
                for found in tqdm(chosen, desc=f"unpacking {path.name}", unit="file"):
                    target = temporary / PurePosixPath(found.filename).name
                    with archive.open(found) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
        except (BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: other methods, passwords
            raise WrisError(f"{path} is damaged ({error}); delete it and fetch it again.") from error


def check_images(images: Path, datasets: Sequence[str]) -> None:
    """Make sure that a folder with COCO's pictures is one, and that no others are in its way.

    Raises:
        WrisError: it has none; the folder of real datasets has its own already.
    """
    if next(images.glob(PICTURES), None) is None:
        raise WrisError(
            f"{images} has no {PICTURES}; give the folder that COCO's train2014.zip unpacks to, or leave out --images"
            " to fetch it."
        )
    for place in (_place(TRAIN2014), *(data_dir() / "images" / dataset for dataset in datasets)):
        if place.is_dir() and not place.is_symlink():
            raise WrisError(f"{place} has pictures already; leave out --images, or remove that folder.")


def link_images(images: Path) -> None:
    """Let `data.load` find COCO's pictures where they are, through a link.

    Raises:
        WrisError: the folder of real datasets is read-only.
    """
    place = _place(TRAIN2014)
    with readable_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(images.resolve())


def count_expressions(dataset: str, images: Path | None = None) -> dict[str, int]:
    """Read a dataset as `data.load` does, and look for each of its pictures.

    Args:
        images: where the pictures are; by default where `data.load` looks.

    Returns:
        How many expressions are in each split: train, val and test (where there are several, all tests together).

    Raises:
        WrisError: a file or a picture is missing; a file is damaged.
    """
    splits = ("train", "val", "test")
    return {split: len(ReferExpressions(data_dir(), dataset, split, images=images).items) for split in splits}


def _place(archive: Archive) -> Path:
    return data_dir() / archive.folder


def _zip_files(archive: Archive) -> list[Path]:
    """What has arrived of an archive that is not unpacked yet."""
    path = _place(archive).with_name(archive.file)
    return [found for found in (path, path.with_name(f"{path.name}.partial")) if found.is_file()]


def _status(dataset: str) -> str:
    if all(map(is_ready, needed([dataset]))):
        return "ready"
    own = DATASETS[dataset]
    return "begun" if is_ready(own) or _zip_files(own) else "missing"


def _find(archive: ZipFile, member: str) -> list[ZipInfo]:
    found = [info for info in archive.infolist() if PurePosixPath(info.filename).match(member)]
    if not found:
        raise WrisError(f"{archive.filename} has no {member}; delete it and fetch it again.")
    return found
