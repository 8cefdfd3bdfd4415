"""The README's figures are those of the results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPLIT = "toyref:val"


def read(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_table_of_methods():
    results = read("benchmark")
    miou = {row["name"]: row["metrics"]["mIoU"] for row in results["rows"] if row["data"] == SPLIT}
    line = r"^\| [^|]* \(`([^`|]+)`\) \|[^|]*\|[^|]*\| ([\d.]+) ± ([\d.]+) \| (\d+) \| (\d+) \|"
    lines = re.findall(line, README, re.MULTILINE)
    assert len(lines) == 8
    for name, mean, std, *milliseconds in lines:
        assert (mean, std) == (f"{miou[name]['mean']:.1f}", f"{miou[name]['std']:.1f}"), name
        assert milliseconds == [f"{results['costs'][name][when]:.0f}" for when in ("milliseconds", "again")], name
    assert f"true box reaches {miou['sam box']['mean']:.1f}." in README


def test_the_table_of_speed():
    rows = {row["name"]: row["speedup"] for row in read("iterprime_speed")["rows"]}
    assert f"| toy {rows['toy']:.0f}×, ALBEF base {rows['albef_base']:.0f}× |" in README
    ratios = read("ppt_cache")["ratios"]
    for row in ("computed anew", "computed anew for each expression"):
        assert f"| {ratios[row] / ratios['cached']:.0f}× |" in README, row
