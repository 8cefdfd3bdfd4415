"""Backgrounds: six painted landscapes with paper-like texture.

A bank of them is painted once a process; a scene takes one, mirrors it or not and shifts its tint.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

BANK = 120

# sky at the top, sky at the horizon, hills, ground far, ground near
PLACES = {
    "meadow": ((150, 205, 240), (222, 240, 246), (132, 178, 128), (158, 200, 118), (112, 166, 92)),
    "beach": ((140, 200, 236), (232, 244, 244), (96, 168, 200), (238, 220, 172), (220, 194, 140)),
    "town": ((176, 196, 216), (236, 232, 226), (168, 162, 172), (184, 184, 186), (150, 150, 156)),
    "snow": ((176, 206, 232), (240, 244, 250), (206, 220, 234), (240, 244, 250), (212, 224, 238)),
    "evening": ((122, 116, 172), (250, 200, 164), (140, 118, 156), (192, 166, 150), (158, 136, 130)),
    "room": ((232, 214, 190), (226, 204, 178), (226, 204, 178), (186, 140, 100), (164, 118, 82)),
}


def sample(rng: np.random.Generator, size: int) -> Image.Image:
    """An RGB background of size × size pixels, free to be painted on."""
    picture = _bank_picture(int(rng.integers(BANK)), size)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    red, green, blue = (int(v) for v in rng.integers(-12, 13, 3))
    tables = [np.clip(np.arange(256) + shift, 0, 255).astype(int).tolist() for shift in (red, green, blue)]
    return picture.point(tables[0] + tables[1] + tables[2])


@lru_cache(maxsize=BANK)
def _bank_picture(index: int, size: int) -> Image.Image:
    rng = np.random.default_rng([20240607, index])
    name = list(PLACES)[index % len(PLACES)]
    top, bottom, hills, far, near = PLACES[name]
    horizon = int(size * rng.uniform(0.3, 0.52))
    picture = Image.new("RGB", (size, size))
    picture.paste(_gradient(top, bottom, size, horizon), (0, 0))
    picture.paste(_gradient(far, near, size, size - horizon), (0, horizon))
    draw = ImageDraw.Draw(picture)
    if name == "town":
        _paint_houses(rng, draw, size, horizon, hills)
    elif name == "beach":
        draw.rectangle((0, horizon - size // 14, size, horizon), fill=hills)
    elif name == "room":
        draw.rectangle((0, horizon, size, horizon + size // 50), fill=(250, 244, 234))
        for x in range(int(rng.integers(size // 8)), size, size // 8):
            draw.line((x, 0, x, horizon - 1), fill=tuple(c - 8 for c in top), width=size // 32)
    else:
        for _ in range(3):
            x, width, height = rng.integers(0, size), rng.integers(size // 3, size), rng.integers(size // 12, size // 4)
            tone = tuple(int(c + rng.integers(-12, 13)) for c in hills)
            box = (int(x - width // 2), int(horizon - height), int(x + width // 2), int(horizon + height))
            draw.pieslice(box, 180, 360, fill=tone)
    if name != "room":
        _paint_clouds(rng, draw, size, horizon)
    return _add_texture(rng, picture.filter(ImageFilter.BoxBlur(1)))


def _gradient(start: tuple[int, ...], end: tuple[int, ...], width: int, height: int) -> Image.Image:
    rows = np.arange(height)[:, None]
    column = (np.array(start) * (height - rows) + np.array(end) * rows) // max(1, height)
    return Image.fromarray(np.repeat(column[:, None].astype(np.uint8), width, axis=1))


def _paint_houses(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, tone) -> None:
    x = 0
    while x < size:
        width, height = (int(v) for v in rng.integers(size // 14, size // 6, 2))
        shade = tuple(int(c + rng.integers(-14, 15)) for c in tone)
        draw.rectangle((x, horizon - height, x + width, horizon), fill=shade)
        for y in range(horizon - height + 5, horizon - 6, 9):
            for window in range(x + 4, x + width - 4, 8):
                draw.rectangle((window, y, window + 2, y + 3), fill=tuple(min(255, c + 26) for c in shade))
        x += width + 1


def _paint_clouds(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int) -> None:
    for _ in range(int(rng.integers(0, 4))):
        x, y = int(rng.integers(0, size)), int(rng.integers(size // 20, max(size // 20 + 1, horizon * 2 // 3)))
        unit = int(rng.integers(size // 32, size // 16))
        for dx, dy, r in ((-2, 0, 1), (-1, -1, 1), (0, 0, 2), (1, -1, 1), (2, 0, 1)):
            cx, cy, radius = x + dx * unit, y + dy * unit // 2, unit * (2 + r) // 3
            draw.ellipse((cx - radius, cy - radius * 2 // 3, cx + radius, cy + radius * 2 // 3), fill=(250, 250, 250))


def _add_texture(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Blotches of three sizes, like watercolour on paper."""
    for cells, tone, tint in ((8, 7, 5), (32, 6, 3), (128, 9, 2)):
        noise = (
            128 + rng.integers(-tone, tone + 1, (cells, cells, 1)) + rng.integers(-tint, tint + 1, (cells, cells, 3))
        )
        blotches = Image.fromarray(noise.astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
        picture = ImageChops.add(picture, blotches, scale=1, offset=-128)
    return picture
