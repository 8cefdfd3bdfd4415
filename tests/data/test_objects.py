"""An ImageNet-style folder: what is found in it, and what is said when nothing is."""

import pytest
from PIL import Image

from wris_lib.data.objects import ObjectImage, ObjectImages
from wris_lib.errors import WrisError


def test_pictures_and_class_names(tmp_path):
    for name in ["traffic_light/b.png", "dog/2.JPEG", "dog/1.jpg", "dog/notes.txt", "dog/._1.jpg", "top.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".txt":
            path.touch()
        else:
            Image.new("RGB", (2, 2)).save(path)
    (tmp_path / "empty").mkdir()
    assert ObjectImages(tmp_path).items == [
        ObjectImage(tmp_path / "dog" / "1.jpg", "dog"),
        ObjectImage(tmp_path / "dog" / "2.JPEG", "dog"),
        ObjectImage(tmp_path / "traffic_light" / "b.png", "traffic light"),
    ]
    assert ObjectImages(str(tmp_path)).items == ObjectImages(tmp_path).items


def test_object_images_carry_no_masks(tmp_path):
    item = ObjectImage(tmp_path / "dog" / "1.jpg", "dog")
    assert set(vars(item)) == {"image_path", "class_name"}
    with pytest.raises(AttributeError):
        item.mask  # noqa: B018


def test_missing_folder(tmp_path):
    with pytest.raises(WrisError, match="there is no image folder .*/nowhere; it should hold one folder a class"):
        ObjectImages(tmp_path / "nowhere")


def test_no_pictures_where_they_should_be(tmp_path):
    (tmp_path / "train" / "dog").mkdir(parents=True)
    (tmp_path / "train" / "dog" / "1.jpg").touch()  # one level too deep
    with pytest.raises(WrisError, match="there are no images in .*; they should lie in one folder a class"):
        ObjectImages(tmp_path)
    assert len(ObjectImages(tmp_path / "train").items) == 1
