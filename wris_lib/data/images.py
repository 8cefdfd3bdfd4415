"""Pictures and expressions as people hand them in, made uniform.

Everything behind this module sees upright 8-bit RGB pictures and non-empty expressions.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wris_lib.download import FETCH
from wris_lib.errors import WrisError

ELSEWHERE = f"(`{FETCH} --data refcoco --images FOLDER` records where COCO's are)"
MAX_PIXELS = 40_000_000  # as RGB this is 120 MB, and no model here looks at more than 1024 x 1024 pixels


def load_image(source: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """Read a picture from wherever it is.

    The EXIF orientation is applied, transparent pixels are laid on white, grey is repeated over the three
    channels, and 16-bit values are scaled to 8 bits. Of an animation the first frame is taken.

    Args:
        source: a file, a PIL image, or an array of shape [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4]
            (RGBA), either uint8, uint16, bool, or float in [0, 1].

    Returns:
        A new PIL image of mode RGB, at most `MAX_PIXELS` large.

    Raises:
        WrisError: there is no such file; it is empty, cut short or no image; the image is too large; the
            array has another shape, type or value range.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_array_to_image(source), "the array")
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the PIL image")
    if not isinstance(source, str | os.PathLike):
        raise WrisError(
            f"an image is a file's path, a PIL image or a NumPy array, but this is a {type(source).__name__}."
        )
    if os.path.isdir(source):
        raise WrisError(f"{source} is a folder; give the path of an image file in it.")
    if not os.path.exists(source):
        raise WrisError(f"there is no image file {source}; check the path.")
    if os.path.getsize(source) == 0:
        raise WrisError(f"the image file {source} is empty (0 bytes); copy or download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(Path(source))
    except Image.DecompressionBombError as error:
        raise _too_large(source) from error
    except UnidentifiedImageError as error:
        raise WrisError(f"{source} is not an image in a format that Pillow reads, such as JPEG or PNG.") from error
    except PermissionError as error:
        raise WrisError(f"this user may not read the image file {source}; change its permissions.") from error
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error ...
        raise _damaged(source, error) from error
    with image:
        return _to_rgb(image, source)


def check_present(paths: set[Path], dataset: str) -> None:
    """Make sure that all of a dataset's images are there, before hours of work depend on it.

    Raises:
        WrisError: some are not.
    """
    missing = sorted(path for path in paths if not path.is_file())
    if missing:
        raise WrisError(
            f"{len(missing)} of the {len(paths)} images of {dataset} are missing, the first is {missing[0]}; "
            f"copy them there {ELSEWHERE}."
        )


def check_expression(text: str) -> str:
    """The expression without the white space around it. Any language, any symbols and any length may follow.

    Raises:
        WrisError: nothing is left.
    """
    if not isinstance(text, str):
        raise WrisError(f"an expression is a string such as 'the left dog', but this is a {type(text).__name__}.")
    if not text.strip():
        raise WrisError("the expression is empty; say what to look for, such as 'the left dog'.")
    return text.strip()


def _to_rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    if image.width * image.height == 0:
        raise WrisError(f"{name} has no pixels: it is {image.width} wide and {image.height} high.")
    try:
        image = ImageOps.exif_transpose(image)  # reads the pixels, which is where a broken file shows
    except Exception as error:  # as above
        raise _damaged(name, error) from error
    if image.mode.startswith("I"):  # more than 8 bits: "I;16", and "I" for 16-bit PNGs in Pillow before 11
        image = _array_to_image(np.asarray(image).clip(0, 65535).astype(np.uint16))
    elif image.mode == "F":
        image = _array_to_image(np.asarray(image))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _array_to_image(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise WrisError(
            f"an image array has the shape [height, width] or [height, width, 3], but this one has "
            f"{list(array.shape)}; move the channels last and pass one image at a time."
        )
    if array.dtype == np.uint16:
        array = array // 257  # 65535 becomes 255
    elif array.dtype == bool:
        array = array * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():
            raise WrisError("a float image has values in [0, 1], but this one has others; divide it by 255, perhaps.")
        array = (array * 255).round()
    elif array.dtype != np.uint8:
        raise WrisError(f"an image array is uint8, or float in [0, 1], but this one is {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def _damaged(name: str | os.PathLike, error: Exception) -> WrisError:
    return WrisError(f"{name} is cut short or damaged ({error}); copy or download it again, or save it as PNG.")


def _too_large(name: str | os.PathLike) -> WrisError:
    return WrisError(f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels; shrink it and try again.")
