"""Results as files: the JSON is the source, the table and the picture are made from it alone.

`NAME.json` is {"made": {"command", "date", "device", "seeds", "versions"}, "rows": [...]}. A row has "name" (of the
method), "data", "n" (expressions), "images", "metrics" (see `wris_lib.evaluate.summarize`) and "kinds" (the same by
kind of expression). All figures are percent. A row that an earlier command made has a "made" of its own. A comparison
of everything also has "costs", see `wris_lib.cost.measure`, and in "made" why methods were "left_out".
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wris_lib.errors import WrisError
from wris_lib.evaluate import OUTCOMES
from wris_lib.files import atomic_write, write_json

Results = dict[str, Any]

RESULTS = Path(__file__).resolve().parent.parent / "results"  # of the checkout
COLUMNS = (
    "mIoU",
    "oIoU",
    "P@0.3",
    "P@0.5",
    "P@0.7",
    "P@0.9",
    "PointM",
    "part instead of whole",
    "wrong object",
)
COST_COLUMNS = ("Position", "Others", "ms", "again", "MB", "trained", "supervision")
MOST_ROWS = 40  # in one picture or table
# Okabe and Ito's colours, which colour-blind readers tell apart; grey for what is neither right nor interesting.
OUTCOME_COLORS = dict(zip(OUTCOMES, ("#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#DDDDDD"), strict=True))


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        WrisError: there is no such file, or it is not a result.
    """
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WrisError(f"there is no result {path}; make it with `python -m wris_lib benchmark`.") from error
    except ValueError as error:
        raise WrisError(f"{path} is damaged; delete it and run the benchmark again.") from error
    if not isinstance(results, dict) or not {"made", "rows"} <= results.keys():
        raise WrisError(f"{path} is no result of the benchmark; choose another name.")
    return results


def write(
    path: Path, made: dict[str, Any], rows: list[dict[str, Any]], costs: dict[str, dict[str, Any]] | None = None
) -> Results:
    """Put rows into a results file, in place of those with the same name and data, and redo table and picture.

    Args:
        path: of the file.
        made: what made the rows.
        rows: new ones.
        costs: new ones by a row's name; earlier ones of other rows stay.

    Raises:
        WrisError: the file there is not a result, or the folder cannot be written.
    """
    path = Path(path)
    merged, costs = {}, costs or {}
    if path.exists():
        before = read(path)
        costs = before.get("costs", {}) | costs
        merged = {(row["name"], row["data"]): {"made": before["made"]} | row for row in before["rows"]}
    merged.update({(row["name"], row["data"]): row for row in rows})
    results = {"made": made, "rows": list(merged.values())} | ({"costs": costs} if costs else {})
    write_json(path, results)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(_tables(results) + "\n")
    with atomic_write(path.with_suffix(".png")) as file:
        picture(results).savefig(file, format="png", dpi=100)
    return results


def table(results: Results, data: str | None = None, columns: tuple[str, ...] = COLUMNS) -> str:
    """Results as a Markdown table: percent, ± the bootstrap's standard error; costs where they were measured.

    Args:
        results: as `read` has them.
        data: only this split, without a column for it.
        columns: metrics to show.
    """
    lines, names = cells(results, data, columns), 2 if data is None else 1
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    # Names to the left, figures to the right.
    rule = ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _tables(results: Results) -> str:
    """One table, or where that would be too long one for each split."""
    if len(results["rows"]) <= MOST_ROWS:
        return table(results)
    splits = dict.fromkeys(row["data"] for row in results["rows"])
    return "\n\n".join(["# Split by split", *(f"## {data}\n\n{table(results, data)}" for data in splits)])


def cells(results: Results, data: str | None = None, columns: tuple[str, ...] = COLUMNS) -> list[list[str]]:
    """A table as text, its head first: name, data, n, percent with standard error, and costs where there are any.

    Of costs, "Position" and "Others" are mIoU by kind of expression, "ms" is the median for the first expression
    about an image, "again" for another one, "MB" the peak of memory, "trained" counts parameters.

    Args:
        results: as `read` has them.
        data: only this split, without a column for it.
        columns: metrics to show.
    """
    costs = results.get("costs", {})
    lines = [["method", "data", "n", *columns, *(COST_COLUMNS if costs else ())]]
    for row in results["rows"]:
        figures = [row["metrics"].get(column) for column in columns]
        if costs:
            kinds = [row["kinds"].get(kind, {"metrics": {}}) for kind in COST_COLUMNS[:2]]
            figures += [kind["metrics"].get("mIoU") for kind in kinds]
        shown = [f"{figure['mean']:.1f} ± {figure['std']:.1f}" if figure else "–" for figure in figures]
        lines.append([row["name"], row["data"], str(row["n"]), *shown])
        if costs:
            lines[-1] += _cost_cells(costs.get(row["name"]))
    return lines if data is None else [[line[0], *line[2:]] for line in lines if line[1] in ("data", data)]


def _cost_cells(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:
        return ["–"] * 5
    figures = [*(f"{cost[figure]:.0f}" for figure in ("milliseconds", "again", "megabytes")), f"{cost['parameters']:,}"]
    return [*figures, cost["supervision"]]


def picture(results: Results) -> Figure:
    """mIoU with its 95 % interval, and beside it what became of the expressions; one bar a row.

    Where that would be more than `MOST_ROWS`, only the first row's split is shown.
    """
    rows = results["rows"]
    if len(rows) > MOST_ROWS:
        rows = [row for row in rows if row["data"] == rows[0]["data"]]
    splits = {row["data"] for row in rows}
    labels = [row["name"] if len(splits) == 1 else f"{row['name']}, {row['data']}" for row in rows]
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(rows)), layout="constrained")
    scores, shares = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    places = range(len(rows))
    means = [row["metrics"]["mIoU"]["mean"] for row in rows]
    reach = [
        [row["metrics"]["mIoU"]["mean"] - row["metrics"]["mIoU"]["low"] for row in rows],
        [row["metrics"]["mIoU"]["high"] - row["metrics"]["mIoU"]["mean"] for row in rows],
    ]
    scores.barh(places, means, xerr=reach, color="#56B4E9", error_kw={"lw": 1})
    for place, mean in zip(places, means, strict=True):
        scores.text(1, place, f"{mean:.1f}", va="center", fontsize=8)
    scores.set_yticks(places, labels, fontsize=9)
    scores.invert_yaxis()
    where = f"{splits.pop()}: " if len(splits) == 1 else ""
    scores.set_title(f"{where}mIoU and its 95 % interval", loc="left", fontsize=10)
    start = [0.0] * len(rows)
    for outcome in OUTCOMES:
        widths = [row["metrics"][outcome]["mean"] for row in rows]
        shares.barh(places, widths, left=start, color=OUTCOME_COLORS[outcome], label=outcome, edgecolor="white", lw=0.5)
        start = [before + width for before, width in zip(start, widths, strict=True)]
    shares.set_title("what became of the expressions", loc="left", fontsize=10)
    for axes in (scores, shares):
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent", fontsize=9)
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(OUTCOMES), fontsize=8, frameon=False)
    return figure
