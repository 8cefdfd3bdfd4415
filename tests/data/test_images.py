"""Every picture and expression that a user may hand in either works or gets one clear sentence."""

import inspect
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from wris_lib.data.images import check_expression, load_image
from wris_lib.errors import WrisError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def png_header(width, height, bits):
    """A PNG that claims a size and has almost no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def noise(width=64, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# -------------------------------------------------------------------------------------------- what works


def test_a_path_a_string_an_image_and_an_array_are_the_same(tmp_path):
    picture = noise()
    picture.save(tmp_path / "a.png")
    for source in [tmp_path / "a.png", str(tmp_path / "a.png"), picture, np.asarray(picture)]:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.size == (64, 48)
        assert np.array_equal(np.asarray(loaded), np.asarray(picture))


def test_the_picture_is_a_copy():
    picture = noise()
    load_image(picture).putpixel((0, 0), WHITE)
    assert picture.getpixel((0, 0)) != WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (100, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("I;16", 65535, WHITE),
        ("I;16", 257 * 100, (100, 100, 100)),
    ],
)
def test_modes_of_png(tmp_path, mode, colour, expected):
    Image.new(mode, (5, 4), colour).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((4, 3)) == expected


def test_palette_with_a_transparent_colour(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "opaque.png")
    picture.save(tmp_path / "transparent.png", transparency=0)
    assert list(np.asarray(load_image(tmp_path / "opaque.png"))[0].ravel()) == [0, 0, 255, 255, 0, 0]
    assert list(np.asarray(load_image(tmp_path / "transparent.png"))[0].ravel()) == [255, 255, 255, 255, 0, 0]


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.allclose(np.asarray(load_image(tmp_path / "a.jpg")), RED, atol=3)


@pytest.mark.parametrize(
    ("mode", "value"), [("I", 257 * 100), ("I;16", 257 * 100), ("I;16B", 257 * 100), ("F", 100 / 255)]
)
def test_deep_pil_images(mode, value):
    assert load_image(Image.new(mode, (3, 2), value)).getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """A camera held in any way gives the same upright picture: red above, blue below."""
    upright = Image.new("RGB", (32, 48), (0, 0, 255))
    upright.paste(RED, (0, 0, 32, 24))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    for source in [tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")]:
        loaded = load_image(source)
        assert loaded.size == (32, 48)
        assert np.allclose(loaded.getpixel((16, 8)), RED, atol=10)
        assert np.allclose(loaded.getpixel((16, 40)), (0, 0, 255), atol=10)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == RED


def test_twenty_thousand_pixels_wide(tmp_path):
    Image.new("RGB", (20_000, 10), RED).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (20_000, 10)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    "array",
    [
        np.full((2, 3), 100, np.uint8),
        np.full((2, 3, 1), 100, np.uint8),
        np.full((2, 3, 3), 100, np.uint8),
        np.full((2, 3, 4), [100, 100, 100, 255], np.uint8),
        np.full((2, 3, 3), 100 / 255, np.float32),
        np.full((2, 3), 100 / 255, np.float64),
        np.full((2, 3), 257 * 100, np.uint16),
        np.full((3, 2, 3), 100, np.uint8).transpose(1, 0, 2),
    ],
)
def test_arrays(array):
    loaded = load_image(array)
    assert loaded.size == (3, 2)
    assert loaded.getpixel((2, 1)) == (100, 100, 100)


def test_a_mask_is_black_and_white():
    assert load_image(np.array([[True, False]])).getpixel((0, 0)) == WHITE


# ------------------------------------------------------------------------------------------ what does not


def test_missing(tmp_path):
    with pytest.raises(WrisError, match="there is no image file .*nowhere.jpg; check the path"):
        load_image(tmp_path / "nowhere.jpg")
    with pytest.raises(WrisError, match="there is no image file"):
        load_image("x" * 5_000)
    with pytest.raises(WrisError, match="there is no image file"):
        load_image("a\0b.jpg")


def test_folder(tmp_path):
    with pytest.raises(WrisError, match="is a folder"):
        load_image(tmp_path)


def test_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(WrisError, match=r"a\.jpg is empty \(0 bytes\)"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("content", [b"\0", b"<svg/>", b"no image at all" * 100, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_no_image(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(WrisError, match=r"a\.jpg is not an image in a format"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated(tmp_path, kind, share):
    stream = io.BytesIO()
    noise().save(stream, kind)
    content = stream.getvalue()
    (tmp_path / "a").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WrisError, match=f"{tmp_path}/a is (cut short or damaged|not an image)"):
        load_image(tmp_path / "a")
    (tmp_path / "a").write_bytes(content)
    assert load_image(tmp_path / "a").size == (64, 48)


def test_truncated_pil_image(tmp_path):
    """Pillow reads the pixels late, so an image that opened well may be broken all the same."""
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-500])
    with pytest.raises(WrisError, match="the PIL image is cut short"):
        load_image(Image.open(tmp_path / "a.jpg"))


def test_damaged_in_the_middle(tmp_path):
    noise().save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[200:240] = bytes(40)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(WrisError, match="damaged"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(20_000, 20_000), (20_000, 6_000), (20_000, 2_001)])
def test_too_large(tmp_path, size):
    """Refused by the header, before any memory is spent, and without Pillow's own warning."""
    (tmp_path / "a.png").write_bytes(png_header(*size, bits=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WrisError, match=r"a\.png has more than 40 megapixels; shrink it"):
            load_image(tmp_path / "a.png")


def test_too_large_array_and_pil_image():
    with pytest.raises(WrisError, match="the array has more than 40 megapixels"):
        load_image(np.broadcast_to(np.uint8(0), (20_000, 2_001)))
    with pytest.raises(WrisError, match="the PIL image has more than 40 megapixels"):
        load_image(Image.new("1", (20_000, 2_001)))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (3, 20, 30), (1, 4, 4, 3), ()])
def test_array_of_another_shape(shape):
    with pytest.raises(WrisError, match=r"\[height, width, 3\], but this one has \["):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_array_without_pixels(size):
    with pytest.raises(WrisError, match="no pixels"):
        load_image(np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize("value", [-0.1, 1.01, 255.0, np.nan, np.inf])
def test_float_array_out_of_range(value):
    array = np.zeros((4, 4, 3), np.float32)
    array[1, 2, 0] = value
    with pytest.raises(WrisError, match=r"values in \[0, 1\]"):
        load_image(array)


@pytest.mark.parametrize("kind", [np.int64, np.complex64, object])
def test_array_of_another_type(kind):
    with pytest.raises(WrisError, match="uint8, or float"):
        load_image(np.zeros((4, 4, 3), kind))


@pytest.mark.parametrize("source", [None, 3, b"bytes", [[0, 1]]])
def test_something_else(source):
    load = inspect.unwrap(load_image)  # beneath the type checks of the tests, as users have it
    with pytest.raises(WrisError, match="a file's path, a PIL image or a NumPy array, but this is a"):
        load(source)


# ------------------------------------------------------------------------------------------ expressions


@pytest.mark.parametrize(
    "text",
    [
        "the left dog",
        "der grüne Hund",
        "左边的狗",
        "الكلب الأيسر",
        "🐕",
        "the dog that " * 1_000 + "barks",
        "a\nb",
        "?!",
    ],
)
def test_expressions_pass_as_they_are(text):
    assert check_expression(f"  {text}\n") == text


@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000\u00a0"])
def test_empty_expressions(text):
    with pytest.raises(WrisError, match="the expression is empty; say what to look for"):
        check_expression(text)


@pytest.mark.parametrize("text", [None, 3, ["the left dog"]])
def test_expressions_of_another_type(text):
    with pytest.raises(WrisError, match="an expression is a string .* but this is a"):
        inspect.unwrap(check_expression)(text)
