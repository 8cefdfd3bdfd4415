"""Pictures of a comparison of all methods: cost against quality, splits, kinds of expressions, agreement.

All are made from `results/benchmark.json`, or from the answers beside it, and from the split's images.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from wris_lib import examples, show
from wris_lib.contestants import ORACLE
from wris_lib.data.coco import decode_mask
from wris_lib.data.refer import EvaluationItem
from wris_lib.errors import WrisError
from wris_lib.evaluate import Record
from wris_lib.report import Results

# By supervision, in the order in which it grows; Okabe and Ito's, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = "os^D"


def rows_of(results: Results, spec: str) -> dict[str, dict[str, Any]]:
    """A split's rows by their names.

    Raises:
        WrisError: the results have no rows of it.
    """
    rows = {row["name"]: row for row in results["rows"] if row["data"] == spec}
    if not rows:
        known = ", ".join(dict.fromkeys(row["data"] for row in results["rows"]))
        raise WrisError(f"the results have no rows of {spec}; choose one of: {known}.")
    return rows


def cost_picture(results: Results, spec: str) -> Figure:
    """Milliseconds an expression (median, quartiles) against mIoU (95 % interval), a point for each row.

    Args:
        results: with costs, as `benchmark --all` leaves them.
        spec: the split.

    Raises:
        WrisError: the results have no costs, or no rows of the split.
    """
    rows, costs = rows_of(results, spec), results.get("costs", {})
    shown = [name for name in rows if name in costs]
    if not shown:
        raise WrisError("the results have no costs; measure them with `python -m wris_lib benchmark --all`.")
    told = list(dict.fromkeys(costs[name]["supervision"] for name in shown))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    quartiles = [costs[name]["quartiles"] for name in shown]
    axes.set_xlim(0.8 * min(low for low, _ in quartiles), 1.6 * max(high for _, high in quartiles))
    points = {name: (costs[name]["milliseconds"], rows[name]["metrics"]["mIoU"]["mean"]) for name in shown}
    for name in shown:
        figures, cost = rows[name]["metrics"]["mIoU"], costs[name]
        style = told.index(cost["supervision"]) % len(COLORS)
        (x, y), (low, high) = points[name], cost["quartiles"]
        axes.errorbar(
            *(x, y),
            xerr=[[max(0.0, x - low)], [max(0.0, high - x)]],
            yerr=[[y - figures["low"]], [figures["high"] - y]],
            fmt=MARKERS[style],
            color=COLORS[style],
            ms=7,
            lw=0.8,
        )
        # To the left where another point is close on the right, so that no name covers one.
        beside = any(1 <= other[0] / x < 2 and abs(other[1] - y) < 5 for n, other in points.items() if n != name)
        place = {"xytext": (-6, 4), "ha": "right"} if beside else {"xytext": (6, 4)}
        axes.annotate(name, (x, y), textcoords="offset points", fontsize=9, **place)
    axes.set_xlabel("milliseconds an expression", fontsize=10)
    axes.set_ylabel("mIoU (%)", fontsize=10)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    key = [
        Line2D([], [], marker=m, color=c, ls="") for m, c, _ in zip(cycle(MARKERS), cycle(COLORS), told, strict=False)
    ]
    figure.legend(key, told, title="told about the task", loc="outside lower center", fontsize=9, frameon=False)
    return figure


def splits_picture(results: Results, metric: str = "mIoU") -> Figure:
    """A metric of every row on every split; in each column the best figure is bold, but for the oracle's.

    Args:
        results: of several rows and splits.
        metric: key of a row's "metrics".
    """
    names = list(dict.fromkeys(row["name"] for row in results["rows"]))
    specs = list(dict.fromkeys(row["data"] for row in results["rows"]))
    found = {(row["name"], row["data"]): row["metrics"].get(metric, {}).get("mean") for row in results["rows"]}
    values = np.array([[found.get((name, spec)) for spec in specs] for name in names], dtype=float)
    figure = Figure(figsize=(1.6 + 0.85 * len(specs), 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    _table(axes, values, names, [spec.replace(":", "\n") for spec in specs], "{:.1f}")
    competing = [place for place, name in enumerate(names) if name != ORACLE]
    for column in range(len(specs)):
        if np.isfinite(values[competing, column]).any():
            best = competing[int(np.nanargmax(values[competing, column]))]
            axes.texts[best * len(specs) + column].set_fontweight("bold")
    axes.set_title(f"{metric} (%), the best in bold", loc="left", fontsize=10)
    return figure


def kinds_picture(results: Results, spec: str, kinds: tuple[str, str] = ("Position", "Others")) -> Figure:
    """mIoU of two kinds of expressions, a line between them for each row.

    Args:
        results: with rows of the split.
        spec: the split.
        kinds: keys of a row's "kinds".

    Raises:
        WrisError: the results have no rows of the split, or a kind is none of its kinds.
    """
    rows = rows_of(results, spec)
    known = next(iter(rows.values()))["kinds"]
    for kind in kinds:
        if kind not in known:
            raise WrisError(f"{spec} has no kind of expressions {kind!r}; choose from: {', '.join(known)}.")
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        figures = [row["kinds"][kind]["metrics"]["mIoU"] for kind in kinds]
        axes.plot([each["mean"] for each in figures], [place, place], color="#999999", lw=2, zorder=1)
        for number, each in enumerate(figures):
            reach = [[each["mean"] - each["low"]], [each["high"] - each["mean"]]]
            label = kinds[number] if place == 0 else None
            style = {"fmt": "os"[number], "color": COLORS[number], "ms": 6, "lw": 0.8}
            axes.errorbar(each["mean"], place, xerr=reach, label=label, **style)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("mIoU (%) and its 95 % interval", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    return figure


def agreement_picture(shares: Float[np.ndarray, "m m"], names: Sequence[str]) -> Figure:
    """How often two methods give the same mask, in percent.

    Args:
        shares: of `examples.agreement`, in [0, 1].
        names: of its rows.
    """
    figure = Figure(figsize=(2 + 0.5 * len(names), 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    _table(axes, 100 * np.asarray(shares), list(names), list(names), "{:.0f}")
    axes.tick_params(axis="x", rotation=60)
    axes.set_title("same mask (IoU of at least 0.5), percent of the expressions", loc="left", fontsize=10)
    return figure


def answer_panel(record: Record, item: EvaluationItem, title: str) -> show.Panel:
    """One answer over its image, with the outline of what was meant."""
    mask = decode_mask(record["mask"], item.height, item.width)
    return show.Panel(item.image_path, title, mask=mask, referent=item.mask)


def disagreements_picture(
    found: Mapping[str, Sequence[Record]], items: Sequence[EvaluationItem], count: int, inches: float = 1.7
) -> show.Picture:
    """The expressions that some answer well and others badly; in a row what was meant, and everybody's answer.

    Args:
        found: by a method's name, records of the same expressions in the same order; see `examples.disagreements`.
        items: of the split, all, in its order.
        count: of expressions.
        inches: width of a panel.
    """
    panels = []
    for place in examples.disagreements(found, count):
        item = items[next(iter(found.values()))[place]["item"]]
        panels.append(show.Panel(item.image_path, f"“{item.expression}”", referent=item.mask))
        for name, records in found.items():
            panels.append(answer_panel(records[place], item, f"{name}\nIoU {records[place]['iou']:.2f}"))
    return show.grid(panels, columns=1 + len(found), inches=inches)


def _table(
    axes: Axes, values: Float[np.ndarray, "r c"], rows: Sequence[str], columns: Sequence[str], form: str
) -> None:
    """Numbers on a blue that grows darker with them; row by row they are `axes.texts`."""
    axes.imshow(values, cmap="Blues", aspect="auto", vmin=0, vmax=np.nanmax(values) * 1.15)
    dark = 0.62 * np.nanmax(values) * 1.15
    for (row, column), value in np.ndenumerate(values):
        text = form.format(value) if np.isfinite(value) else "–"
        color = "white" if value > dark else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=color)
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
