"""Object-centric pictures: an ImageNet-style folder, one folder a class.

Such pictures come for free: the folder's name says what the one large object in each is. There are no masks.
"""

from dataclasses import dataclass
from pathlib import Path

from wris_lib.errors import WrisError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class ObjectImage:
    """One picture and the name of what it shows, such as "traffic light"."""

    image_path: Path
    class_name: str


class ObjectImages:
    """The pictures in `<root>/<class>/`, sorted by class and file name.

    Underscores in a folder's name read as spaces.

    Attributes:
        items: one `ObjectImage` a picture.

    Raises:
        WrisError: there is no such folder, or no picture where it should be.
    """

    items: list[ObjectImage]

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if not root.is_dir():
            raise WrisError(f"there is no image folder {root}; it should hold one folder a class.")
        self.items = [
            ObjectImage(path, path.parent.name.replace("_", " "))
            for path in sorted(root.glob("*/*"))
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        ]
        if not self.items:
            raise WrisError(f"there are no images in {root}; they should lie in one folder a class: {root}/dog/1.jpg.")
