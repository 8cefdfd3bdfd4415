"""PCNet's studies without their trainings: which there are, what is shared and kept, and the file's form."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_pcnet_method import Asked, module
from tests.methods.test_pcnet_training import Nobody, pairs
from tests.methods.test_ppt_training import picture
from tests.studies.test_ppt_studies import check_form, record
from wris_lib import questions
from wris_lib.contestants import predictor
from wris_lib.data.refer import EvaluationItem
from wris_lib.files import sha256, write_json
from wris_lib.methods.pcnet import MASKS, PcNet
from wris_lib.methods.pcnet.crm import Crm, CrmConfig
from wris_lib.methods.pcnet.training import IMAGES_PER_STEP, Training
from wris_lib.sources import PACKAGE
from wris_lib.studies import pcnet as studies
from wris_lib.studies.common import over_seeds
from wris_lib.studies.pcnet import ALL, BASELINE, COMPONENTS, LONG, OTHERS, SHORT, Run, Runner

tokenizer, clip, segmenter = test_clip.tokenizer, test_ppt_training.clip, test_ppt_training.segmenter

CONFIG = CrmConfig(20)
RUN = Run(CONFIG, Training(), (LONG,))
WEIGHTS = ("clip.safetensors", "sam.safetensors", "t5.safetensors", "parser.msgpack")


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch) -> Path:
    """Checkpoints of the test's own, in an empty cache; no more than their hashes is asked for."""
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    for name in WEIGHTS:
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(studies, "checkpoint_path", lambda checkpoint: tmp_path / checkpoint.file)
    return tmp_path


# ------------------------------------------------------------------------------------------------ where a run is kept

SETTINGS = {
    "steps": 9,
    "images": 4,
    "learning_rate": 0.5,
    "seed": 1,
    "region_shrinking": 0.5,
    "disambiguation": 0.5,
    "others": 2,
    "as_written": True,
}
SIZES = {"channels": 8, "stages": 3, "modulation": "ADD", "temperature": 3.0}


def test_every_setting_has_a_folder_of_its_own(weights):
    assert set(SETTINGS) == {field.name for field in fields(Training)}
    assert set(SIZES) == {field.name for field in fields(CrmConfig)}
    runs = [RUN]
    runs += [replace(RUN, training=replace(RUN.training, **{name: value})) for name, value in SETTINGS.items()]
    runs += [replace(RUN, config=replace(CONFIG, **{name: value})) for name, value in SIZES.items()]
    assert len({run.folder for run in runs}) == len(runs)
    assert RUN.folder.parent == weights / "cache" / "train" / "pcnet-studies" and not RUN.folder.exists()


@pytest.mark.parametrize("part", WEIGHTS)
def test_other_weights_make_another_folder(weights, part):
    before = RUN.folder
    (weights / part).write_text("trained anew")
    assert RUN.folder != before


@pytest.mark.parametrize(("name", "value"), [("CODE", ["changed"]), ("LIMIT", 7)])
def test_other_code_or_measurements_make_another_folder(monkeypatch, name, value):
    before = RUN.folder
    monkeypatch.setattr(studies, name, value)
    assert RUN.folder != before


@pytest.mark.parametrize(
    "name",
    [
        *("train.py", "evaluate.py", "questions.py", "backbones/clip.py", "methods/pcnet/loss.py"),
        *("methods/pcnet/prompt.txt", "methods/ppt/vision.py", "data/toyworld/grammar.py"),
    ],
)
def test_code_that_a_figure_depends_on(name):
    assert sha256(PACKAGE / name) in studies.CODE


def test_what_is_measured_does_not_move_a_run():
    """The row with all components, and the others' usual values, are the same training."""
    other = replace(RUN, splits=(LONG, SHORT))
    assert other.folder == RUN.folder
    write_json(RUN.records(LONG), {})
    assert RUN.finished and not other.finished
    write_json(other.records(SHORT), {})
    assert other.finished and RUN.records(LONG) != RUN.records(SHORT)


# ------------------------------------------------------------------------------------------------------- doing a run


def test_a_run_is_trained_and_measured_on_every_split(monkeypatch):
    runner, trained = object.__new__(Runner), []
    runner.data = pairs([[0, 1]] * 37, channels=20)

    def measure(crm, split):
        trained.append(crm)
        return {"of": split}

    monkeypatch.setattr(runner, "measure", measure)
    run = Run(replace(CONFIG, modulation="ADD"), Training(steps=2), (LONG, SHORT))
    runner.do(run)
    assert run.finished and [json.loads(run.records(s).read_text()) for s in run.splits] == [
        {"of": LONG},
        {"of": SHORT},
    ]
    state = torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained[0].state_dict().items())
    run.records(SHORT).unlink()
    runner.do(run)
    assert len(trained) == 3  # only what was not there
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained[2].state_dict().items())


@pytest.mark.parametrize("stages", [0, 2])
def test_it_is_measured_as_the_benchmark_would(clip, segmenter, tmp_path, monkeypatch, stages):
    """What CLIP and SAM see comes from the cache; both kinds of mask come from one answer."""
    items = []
    for number, (size, texts) in enumerate([((60, 40), ["dog"]), ((32, 48), ["car", "left man"])]):
        path = tmp_path / f"{number}.png"
        picture(size, number).save(path)
        width, height = size
        outline = {"segmentation": [[0, 0, width / 2, 0, width / 2, height, 0, height]], "category_id": 1}
        for text in texts:
            about = {"expression": text, "sent_id": len(items), "kind": "noun", "category": "dog"}
            about |= {"height": height, "width": width, "annotation": outline, "neighbours": []}
            items.append(EvaluationItem(image_path=path, image_id=number, ref_id=0, **about))
    monkeypatch.setattr(studies.data, "load", lambda split: SimpleNamespace(items=items))
    runner, crm = object.__new__(Runner), module(stages)
    runner.clip, runner.segmenter, runner.llm, runner.parser = clip, segmenter, Asked(), Nobody()
    found = runner.measure(crm, LONG)
    for mask in MASKS:
        method = PcNet(clip, segmenter, crm, runner.llm, runner.parser, mask)
        expected = questions.measure(predictor(method), items)
        assert len(found[mask]) == len(expected) == 3
        assert over_seeds([found[mask]]).keys() == over_seeds([expected]).keys()
        for ours, direct in zip(found[mask], expected, strict=True):
            for key in ("image", "expression", "kind", "twins"):
                assert ours[key] == direct[key]
            assert ours["iou"] == pytest.approx(direct["iou"], abs=0.05)  # features are kept as 16-bit floats
    assert any(a["iou"] != b["iou"] for a, b in zip(found["sam"], found["map"], strict=True))


# --------------------------------------------------------------------------------------------------------- the ablation


class FakeRunner:
    """Trains nothing; what would have been measured follows from what was asked for."""

    done: list[Run] = []  # noqa: RUF012

    def do(self, run):
        FakeRunner.done.append(run)
        for split in run.splits:
            iou = figure(run, split)
            write_json(run.records(split), {"map": [record(iou)] * 2, "sam": [record(iou + 0.1)] * 2})


def figure(run: Run, split: str) -> float:
    """An IoU: another one for everything that it may depend on."""
    return (run.config.stages + 5 * (split == SHORT) + 10 * bool(run.training.disambiguation) + run.training.seed) / 100


@pytest.fixture
def fake(monkeypatch) -> type[FakeRunner]:
    monkeypatch.setattr(FakeRunner, "done", [])
    monkeypatch.setattr(studies, "Runner", FakeRunner)
    monkeypatch.setattr(studies, "load_clip", lambda stack: None)
    monkeypatch.setattr(studies, "configure", lambda clip, **choices: CrmConfig(20, **choices))
    return FakeRunner


def test_the_ablation(fake, tmp_path, capsys):
    studies.ablation(steps=50, seeds=(0, 2), folder=tmp_path)
    path = tmp_path / "pcnet_ablation.json"
    assert capsys.readouterr().out == f"{path}\n"
    results = json.loads(path.read_text())
    weight = round(1 / IMAGES_PER_STEP, 4)
    check_form(results, "train pcnet --ablation", [0, 2], steps=50, weight=weight)
    rows = {(row["name"], row["data"]): row for row in results["rows"]}
    assert list(rows) == [(name, LONG) for name in COMPONENTS | OTHERS] + [(name, SHORT) for name in COMPONENTS]
    by_hand = {
        (BASELINE, LONG): 0,
        (ALL, LONG): 12,
        (ALL, SHORT): 17,
        ("+CRM+RaS", SHORT): 7,
        ("N = 4", LONG): 14,
    }
    for (name, split), low in by_hand.items():
        row = rows[name, split]
        assert row["n"] == 2 and set(row["metrics"]) == {"PointM", "mIoU", "SAM mIoU"}
        assert row["metrics"]["mIoU"] == {"mean": low + 1, "std": 1.41, "seeds": [low, low + 2]}
        assert row["metrics"]["SAM mIoU"]["seeds"] == [low + 10, low + 12]
        assert row["metrics"]["PointM"] == {"mean": 100.0, "std": 0.0, "seeds": [100.0, 100.0]}
        assert row["kinds"]["noun"] == {"n": 2, "metrics": row["metrics"]}


def test_the_ablations_trainings(fake, tmp_path):
    """Rows that are the same training share it. Seed after seed, so that all rows are there early."""
    studies.ablation(steps=50, seeds=(0, 1), folder=tmp_path)
    # Of all rows four are the usual training.
    each = len(COMPONENTS | OTHERS) - 3
    assert [run.training.seed for run in fake.done] == [0] * each + [1] * each
    assert len({run.folder for run in fake.done}) == 2 * each
    assert all(run.training.steps == 50 for run in fake.done)
    (usual,) = [run for run in fake.done if (run.config, run.training) == (CONFIG, Training(steps=50))]
    assert usual.splits == (LONG, SHORT)
    studies.ablation(steps=50, seeds=(1,), folder=tmp_path)
    assert len(fake.done) == 2 * each  # and a second time nothing is done


def test_the_usual_number_of_steps(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "OTHERS", {})
    studies.ablation(seeds=(0,), folder=tmp_path)
    assert {run.training.steps for run in fake.done} == {Training().steps} and len(fake.done) == len(COMPONENTS)
    assert json.loads((tmp_path / "pcnet_ablation.json").read_text())["steps"] == Training().steps


def test_a_row_changes_what_its_name_says():
    usual = (Training(), CONFIG)

    def built(name: str) -> tuple[Training, CrmConfig]:
        module, training = (COMPONENTS | OTHERS)[name]
        return replace(usual[0], **training), replace(usual[1], **module)

    alone = replace(Training(), region_shrinking=0.0, disambiguation=0.0)
    assert (
        built(ALL) == usual
        and built(BASELINE) == (alone, replace(CONFIG, stages=0))
        and built("+CRM") == (alone, CONFIG)
    )
    assert built("+CRM+RaS") == (replace(alone, region_shrinking=Training().region_shrinking), CONFIG)
    assert built("+CRM+IaD") == (replace(alone, disambiguation=Training().disambiguation), CONFIG)
    for name in OTHERS:
        training, config = built(name)
        match name.split():
            case ["N", "=", number]:
                assert (training, config) == (usual[0], replace(CONFIG, stages=int(number)))
            case ["N_d", "=", number]:
                assert (training, config) == (replace(usual[0], others=int(number)), CONFIG)
            case [term, "as", "written"]:
                assert (replace(training, as_written=False), config) == built(f"+CRM+{term}") and training.as_written
            case ["weights", "of", "1"]:
                expected = replace(usual[0], region_shrinking=1.0, disambiguation=1.0)
                assert (training, config) == (expected, CONFIG)
            case [modulation]:
                assert (training, config) == (usual[0], replace(CONFIG, modulation=modulation))


def test_every_module_of_the_ablation_can_be_built():
    for module_choices, _ in (COMPONENTS | OTHERS).values():
        Crm(replace(CrmConfig(4), **module_choices))
