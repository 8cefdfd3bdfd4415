"""PPT's ablation as a picture: our nine rows beside the paper's (Dai and Yang, CVPR 2024, Table 3).

    ablation_picture()

Digits of a toy world and of RefCOCO must not be compared, orderings may: each side has a panel of its own, and rows
stand in the paper's order.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wris_lib.errors import WrisError
from wris_lib.report import RESULTS

DATA = "toyref:val"  # the file also has rows of other splits
# mIoU on RefCOCO val. Rows 1 to 5 add one thing after another, rows 6 to 9 take one away from row 5.
PAPER = {
    "1 CLIP + SAM": 26.46,
    "2 point prompting": 34.19,
    "3 semantic learning": 38.91,
    "4 + RIS learning": 44.14,
    "5 + domain refinement (full)": 46.76,
    "6 w/o curriculum": 43.28,
    "7 w/o augmented (D_ref)": 42.29,
    "8 w/o free (D_sem)": 39.33,
    "9 w/o IMG": 34.47,
}
FULL = "5 + domain refinement (full)"
# Okabe and Ito's, which colour-blind readers tell apart. They say the same as the gaps between the groups.
BUILT, WHOLE, TAKEN = "#56B4E9", "#0072B2", "#E69F00"


def read_rows(path: str | Path, data: str | None = None) -> dict[str, dict[str, Any]]:
    """Rows of a result file by their names.

    Args:
        path: JSON with a list "rows", such as `results/ppt_ablation.json`.
        data: take rows of this split only, such as "toyref:val"; by default all.

    Raises:
        WrisError: there is no such file, or it is not a result.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["name"]: row for row in rows if data is None or row["data"] == data}
    except FileNotFoundError as error:
        raise WrisError(
            f"there is no result {path}; it comes with the course: restore it with `git checkout -- results`."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WrisError(f"{path} is no result with rows; restore it with `git checkout -- results`.") from error


def read_ablation(path: str | Path = RESULTS / "ppt_ablation.json") -> dict[str, dict[str, Any]]:
    """The nine rows on ToyRef val by their names, in the paper's order.

    Raises:
        WrisError: the file is missing or damaged, or lacks a row.
    """
    rows = read_rows(path, DATA)
    if missing := [name for name in PAPER if name not in rows]:
        raise WrisError(
            f"{path} lacks {len(missing)} of the ablation's rows on {DATA}, the first is {missing[0]!r}; make it with"
            " `python -m wris_lib train ppt --ablation`."
        )
    return {name: rows[name] for name in PAPER}


def ablation_picture(path: str | Path = RESULTS / "ppt_ablation.json") -> Figure:
    """Our mIoU, mean of the seeds with standard deviation and every seed as a dot, beside the paper's.

    Raises:
        WrisError: the file is missing or damaged, or lacks a row.
    """
    figures = [row["metrics"]["mIoU"] for row in read_ablation(path).values()]
    seeds = max(len(figure["seeds"]) for figure in figures)
    # A gap before row 5's variants, and another behind the baseline, show what belongs together.
    places = [number + 0.5 * (number > 0) + 0.5 * (number > 4) for number in range(len(PAPER))]
    colors = [WHOLE if name == FULL else BUILT if number < 5 else TAKEN for number, name in enumerate(PAPER)]

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    means, reach = [f["mean"] for f in figures], [f["std"] for f in figures]
    ours.barh(places, means, height=0.75, color=colors)
    for place, each in zip(places, figures, strict=True):
        if len(each["seeds"]) > 1:
            # Below the middle, so that they hide neither each other nor the figure.
            ours.errorbar(each["mean"], place, xerr=each["std"], color="black", lw=1.2, capsize=3)
            ours.plot(each["seeds"], [place] * len(each["seeds"]), "o", ms=4, mfc="white", mec="black", mew=0.8)
    theirs.barh(places, PAPER.values(), height=0.75, color=colors)
    for axes, values in ((ours, means), (theirs, list(PAPER.values()))):
        axes.axvline(values[4], color=WHOLE, lw=1, ls=":", zorder=0)  # what rows 6 to 9 fall short of
        for place, value, color in zip(places, values, colors, strict=True):
            paint = "white" if color == WHOLE else "black"
            axes.text(0.8, place, f"{value:.1f}", va="center", fontsize=10, color=paint, fontweight="bold")
        axes.set_xlabel("mIoU (%)", fontsize=10)
        axes.tick_params(labelsize=10, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    most = max(mean + spread for mean, spread in zip(means, reach, strict=True))
    ours.set_xlim(0, 1.1 * max(most, *(seed for each in figures for seed in each["seeds"])))
    theirs.set_xlim(0, 1.1 * max(PAPER.values()))
    ours.set_yticks(places, PAPER, fontsize=10)
    ours.invert_yaxis()
    made = f"mean of {seeds} seeds (dots), ± standard deviation" if seeds > 1 else "one seed"
    ours.set_title(f"ours, ToyRef val: {made}", loc="left", fontsize=10)
    theirs.set_title("the paper's Table 3, RefCOCO val", loc="left", fontsize=10)
    return figure
