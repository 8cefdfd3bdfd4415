"""A result as one HTML file that opens anywhere: table, examples, disagreements.

Pictures are inside the file, drawn from the masks that the benchmark kept: no model runs, no server is needed, nothing
is fetched. Examples are of the result's first split.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageColor, ImageFilter

from wris_lib import examples, report
from wris_lib.contestants import ORACLE
from wris_lib.data.coco import decode_mask
from wris_lib.data.images import load_image
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.evaluate import OUTCOMES, Record
from wris_lib.files import atomic_write
from wris_lib.show import PREDICTION, REFERENT

SIDE = 176  # pixels: the longer side of a picture
BEST, DISAGREEMENTS = 3, 8  # how many examples


def check_place(path: Path) -> None:
    """Say whether a page can be written there, before hours of work.

    Raises:
        WrisError: the name does not end in .html, or is a folder's.
    """
    if Path(path).suffix != ".html" or Path(path).is_dir():
        raise WrisError(f"{path} cannot be the page; name a file that ends in .html.")


def write(
    path: Path,
    results: report.Results,
    found: dict[tuple[str, str], list[Record]],
    splits: dict[str, list[EvaluationItem]],
    seed: int = 0,
) -> None:
    """Write the page.

    Args:
        path: of the file.
        results: what the tables show.
        found: records by names of row and split; the same expressions of a split in every row.
        splits: their items.
        seed: of what is drawn among equally bad answers.

    Raises:
        WrisError: an image is missing, or the file cannot be written.
    """
    spec = next(iter(splits))
    records = {name: records for (name, data), records in found.items() if data == spec}
    methods = {name: records[name] for name in records if name != ORACLE} or records
    figures = tuple(column for column in report.COLUMNS if column not in OUTCOMES)  # these are drawn
    specs = dict.fromkeys(row["data"] for row in results["rows"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html").render(
        made=results["made"],
        tables={data: report.cells(results, data, figures) for data in specs},
        outcomes={name: _shares(results, name, spec) for name in methods},
        colors=report.OUTCOME_COLORS,
        spec=spec,
        answers={name: _answers(of_method, splits[spec], seed) for name, of_method in methods.items()},
        disagreements=_disagreements(methods, splits[spec]),
        agreement=list(zip(methods, (100 * examples.agreement(methods)).round().astype(int).tolist(), strict=True)),
    )
    with atomic_write(path, "w") as file:
        file.write(text)


def thumbnail(
    image: Image.Image, mask: Bool[np.ndarray, "H W"] | None, referent: Bool[np.ndarray, "H W"], side: int = SIDE
) -> bytes:
    """A small JPEG: the image, a prediction as an orange area, the referent in a green outline.

    Args:
        image: RGB.
        mask: the prediction; None: there is none to draw.
        referent: the ground truth.
        side: the most that width or height may be, in pixels.
    """
    factor = min(1.0, side / max(image.size))
    size = tuple(max(1, round(length * factor)) for length in image.size)
    small = image.resize(size)
    if mask is not None:
        area = Image.fromarray(mask).convert("L").resize(size)
        small.paste(Image.new("RGB", size, PREDICTION), mask=area.point(lambda value: value * 0.55))
    shape = Image.fromarray(referent).convert("L").resize(size).point(lambda value: 255 * (value > 127))
    inner = np.asarray(shape.filter(ImageFilter.MinFilter(3)))
    for width, color in ((5, "white"), (3, REFERENT)):
        ring = np.asarray(shape.filter(ImageFilter.MaxFilter(width))) > inner
        small.paste(ImageColor.getrgb(color), mask=Image.fromarray(ring))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def _shares(results: report.Results, name: str, spec: str) -> dict[str, float]:
    (row,) = (row for row in results["rows"] if (row["name"], row["data"]) == (name, spec))
    return {outcome: row["metrics"][outcome]["mean"] for outcome in OUTCOMES}


def _answers(records: Sequence[Record], items: Sequence[EvaluationItem], seed: int) -> list[dict[str, Any]]:
    """Pictures of a method's best answers, and of its failures with their rates."""
    shown = [(record, "") for record in examples.best(records, BEST)]
    shown += [(record, f"{share:.0%} of all answers") for record, share in examples.failures(records, seed)]
    return [_figure(record, items, rate) for record, rate in shown]


def _disagreements(
    methods: dict[str, Sequence[Record]], items: Sequence[EvaluationItem]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """By expression, the pictures of all methods' answers."""
    places = examples.disagreements(methods, DISAGREEMENTS) if len(methods) > 1 else []
    return [
        (
            next(iter(methods.values()))[place]["expression"],
            [_figure(records[place], items, name) for name, records in methods.items()],
        )
        for place in places
    ]


def _figure(record: Record, items: Sequence[EvaluationItem], note: str) -> dict[str, Any]:
    item = items[record["item"]]
    mask = decode_mask(record["mask"], item.height, item.width)
    jpeg = thumbnail(load_image(item.image_path), mask, item.mask)
    return {
        "source": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}",
        "expression": record["expression"],
        "outcome": record["outcome"],
        "iou": record["iou"],
        "note": note,
    }
