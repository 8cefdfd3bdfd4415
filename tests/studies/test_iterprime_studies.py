"""IteRPrimE's studies on a tiny random ALBEF: which rows there are, what is counted, and that both ways agree."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.backbones.test_itm import picture
from tests.methods.test_iterprime_method import matcher, vocabulary  # noqa: F401
from tests.studies.test_ppt_studies import check_form, record
from wris_lib import evaluate
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.proposals import SETTINGS, sam_proposer
from wris_lib.backbones.sam import load_sam
from wris_lib.data.toyworld.scenes import UNSEEN
from wris_lib.methods.iterprime import HIDES, IterPrime
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS
from wris_lib.methods.iterprime.igrs import Refinement
from wris_lib.studies import iterprime as studies
from wris_lib.studies.iterprime import CUT, LONG, PEOPLE, TABLES, VAL

TEXTS = ["the red dog", "car left of the two dog", "the red zebra"]


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """Two images, the second of which has enough expressions."""
    items = []
    for number, texts in enumerate((TEXTS[:2], [*TEXTS, "the car"])):
        picture(number).save(tmp_path / f"{number}.png")
        items += [SimpleNamespace(image_path=tmp_path / f"{number}.png", expression=text) for text in texts]
    monkeypatch.setattr(studies.data, "load", lambda split: SimpleNamespace(items=items))
    monkeypatch.setattr(studies, "EXPRESSIONS", 3)
    return items


def test_every_option_of_a_row_is_one_of_the_methods():
    known = set(inspect.signature(IterPrime.load).parameters)
    for splits, rows in TABLES.values():
        assert set(splits) <= {PEOPLE, LONG, VAL}
        assert all(set(options) <= known for options in rows.values())
    assert list(TABLES["aggregation (Table 3)"][1]) == list(AGGREGATIONS)
    assert set(TABLES["hidden (Table 4)"][1]) == set(HIDES)
    assert [options["passes"] for options in TABLES["passes (Figure 6)"][1].values()] == [0, 1, 2, 3, 4, 5]
    decays = [options["decay"] for options in TABLES["decay (Figure 6)"][1].values()]
    np.testing.assert_allclose(decays, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


def test_a_row_asks_the_benchmark_with_plain_numbers(scenes, monkeypatch):
    asked = []
    monkeypatch.setattr(studies, "records_of", lambda *args: asked.append(args) or [])
    studies.ask({"passes": 2, "decay": np.float64(0.1)}, VAL)
    ((row, spec, items, limit, seed, stack),) = asked
    assert (row.name, row.method) == ("iterprime decay=0.1 passes=2", "iterprime")
    assert row.options == {"passes": 2, "decay": 0.1} and type(row.options["decay"]) is float
    assert (spec, items, limit, seed, stack) == (VAL, scenes, studies.LIMIT, 0, "toy")


def test_healed_and_broken_by_hand():
    before = [record(0.4), record(0.49), record(0.5), record(0.9), record(0.1)]
    after = [record(0.5), record(0.3), record(0.49), record(0.8), record(0.9)]
    assert studies.heal(before, after) == {"healed": 2, "broken": 1, "n": 5}


def test_the_ablation_writes_all_tables(monkeypatch, tmp_path, capsys):
    items = [SimpleNamespace(category=UNSEEN[0]), SimpleNamespace(category="dog")]
    monkeypatch.setattr(studies.data, "load", lambda split: SimpleNamespace(items=items))

    def ask(options, split):
        first = 0.2 if options.get("passes") == 0 else 0.6
        return [record(first), record(0.8, "the dog on the left") | {"item": 1}]

    monkeypatch.setattr(studies, "ask", ask)
    studies.ablation(folder=tmp_path)
    path = tmp_path / "iterprime_ablation.json"
    assert capsys.readouterr().out == f"{path}\n"
    results = json.loads(path.read_text())
    rules = ("as here", "released stop")
    healing = {split: {rule: {"healed": 1, "broken": 0, "n": 2} for rule in rules} for split in (LONG, VAL)}
    check_form(results, "study iterprime ablation", [0], healing=healing)
    expected = [(table, name, split) for table, (splits, rows) in TABLES.items() for split in splits for name in rows]
    expected += [("ToyCut (Table 2)", name, CUT) for name in ("all", "unseen")]
    assert [(row["table"], row["name"], row["data"]) for row in results["rows"]] == expected
    whole, unseen = results["rows"][-2:]
    assert (whole["n"], unseen["n"]) == (2, 1)
    assert whole["metrics"]["mIoU"]["mean"] == 70 and unseen["metrics"]["mIoU"]["mean"] == 60
    assert whole["kinds"]["Position"]["metrics"]["mIoU"]["mean"] == 80
    assert whole["metrics"].keys() == evaluate.summarize([record(0.5)]).keys()


@pytest.fixture
def method(matcher):  # noqa: F811
    propose = sam_proposer(load_sam("toy", "cpu"), SETTINGS["toy"])
    return IterPrime(matcher, propose, load_parser("toy"), settings=Refinement(threshold=0.9))


def test_both_ways_give_the_same_maps(method):
    image = Image.new("RGB", (40, 30), "white")
    image.paste(picture(3), (5, 5))
    for fast, slow in zip(method.look(image, TEXTS), studies.straightforward(method, image, TEXTS), strict=True):
        assert len(fast.passes) == len(slow.passes)
        for ours, theirs in zip(fast.passes, slow.passes, strict=True):
            np.testing.assert_allclose(ours.response_map, theirs.response_map, atol=1e-5)
            assert ours.probability == pytest.approx(theirs.probability, abs=1e-5)
            assert (ours.visible == theirs.visible).all()


def test_the_straightforward_way_cleans_up_also_after_an_exception(method, monkeypatch):
    model = method.matcher.model
    cross = model.text_layers[method.matcher.layer].crossattention.self
    monkeypatch.setattr(studies, "aggregate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        studies.straightforward(method, picture(0), TEXTS)
    assert not cross.save_attention and not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_speed_is_a_ratio_of_the_same_work(matcher, scenes, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(studies, "load_matcher", lambda stack: matcher)
    monkeypatch.setattr(studies, "random_albef", lambda size: matcher)
    studies.speed(tmp_path)
    results = json.loads((tmp_path / "iterprime_speed.json").read_text())
    check_form(results, "study iterprime speed", [0], threads=studies.torch.get_num_threads())
    assert [row["name"] for row in results["rows"]] == ["toy", "albef_base"]
    for row in results["rows"]:
        ours, theirs = (row[way]["expressions_per_second"] for way in ("ours", "straightforward"))
        assert row["speedup"] == pytest.approx(ours / theirs, abs=0.06) and row["max_abs_diff"] < 1e-5
        assert row["expressions"] == 3 <= row["passes"] and row["device"] == "cpu"


def test_the_random_albef_is_of_the_published_size(monkeypatch):
    made = []

    class Recorded(studies.Albef):
        def __init__(self, size):
            made.append(size)
            super().__init__(studies.SIZES["toy"])

    monkeypatch.setattr(studies, "Albef", Recorded)
    with pytest.raises(IndexError):  # the toy model has no layer 8
        random = studies.random_albef("base")
        random.layers[random.layer]
    assert made == [studies.SIZES["base"]]
    assert random.tokenizer.tokenize("elephant") == ["elephant"]
