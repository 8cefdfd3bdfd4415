"""The command line: what it passes on, what it prints, and how it ends."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wris_lib.__main__ import REAL_DATA, main
from wris_lib.benchmark import LIMIT, TOY_SPLITS
from wris_lib.data.archives import DATASETS
from wris_lib.errors import WrisError
from wris_lib.methods import Prediction

COMMANDS = ["doctor", "fetch", "segment", "benchmark", "train", "study", "pretrain", "toyworld"]


class Recorder:
    """Stands for a function of the library; keeps what it was called with."""

    def __init__(self, result=None):
        self.result = result

    def __call__(self, *positional, **named):
        self.positional, self.named = positional, named
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def test_help_names_every_command_and_needs_no_torch():
    code = "import sys; from wris_lib.__main__ import main\ntry: main(['-h'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "-h"])
    assert f"python -m wris_lib {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["fetch"],
        ["fetch", "toys"],
        ["fetch", "paper", "--data"],
        ["fetch", "paper", "--data", "toyref"],
        ["segment", "a.png"],
        ["pretrain", "llm"],
        ["train"],
        ["train", "clip_sam"],
        ["train", "ppt", "--seed", "many"],
        ["train", "ppt", "--ablation", "--study"],
        ["train", "ppt", "--pseudo-labels", "--cache-speed"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_a_limit_is_a_positive_number(limit: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "--method", "clip_sam", "--data", "toyref:val", "--limit", limit])
    assert f"expected a positive number, got '{limit}'" in capsys.readouterr().err


def test_an_error_is_one_line_without_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "wris_lib", "segment", str(tmp_path / "none.jpg"), "the dog"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "none.jpg" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (WrisError("the disk is full; make room."), 2, "error: the disk is full; make room.\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; what was finished is kept.\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "error: the package torch is missing from"),
    ],
)
def test_how_it_ends(error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("wris_lib.fetch.fetch_paper", Recorder(error))
    assert main(["fetch", "paper"]) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("code", [0, 1])
def test_doctor_gives_its_exit_code(code: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wris_lib.doctor.main", Recorder(code))
    assert main(["doctor"]) == code


@pytest.mark.parametrize(("flags", "ask"), [([], True), (["--yes"], False)])
def test_fetch(flags: list[str], ask: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wris_lib.fetch.fetch_paper", fetched := Recorder())
    assert main(["fetch", "paper", *flags]) == 0
    assert fetched.positional == ([], None) and fetched.named == {"ask": ask}


def test_fetch_of_data(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("wris_lib.fetch.fetch_paper", fetched := Recorder())
    assert main(["fetch", "paper", "--data", "refcoco", "refcocog", "--images", "coco/train2014"]) == 0
    assert fetched.positional == (["refcoco", "refcocog"], Path("coco/train2014"))
    assert main(["fetch", "paper", "--images", "coco/train2014"]) == 2
    assert "add --data and its name, such as refcoco" in capsys.readouterr().err
    assert tuple(DATASETS) == REAL_DATA


def test_segment_writes_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    Image.new("RGB", (40, 20)).save(tmp_path / "image.png")
    mask = np.zeros((20, 40), dtype=bool)
    mask[:10, :10] = True
    prediction = Prediction(mask, np.zeros((20, 40)), np.array([[5.0, 5.0]]), np.array([1]), 0.75)
    monkeypatch.setattr("wris_lib.methods.segment", segmented := Recorder(prediction))
    image, out = str(tmp_path / "image.png"), tmp_path / "overlay.png"
    assert main(["segment", image, "the dog", "--out", str(out), "--method", "other", "--stack", "paper"]) == 0
    assert segmented.positional == (image, "the dog")
    assert segmented.named == {"method": "other", "stack": "paper"}
    assert Image.open(out).width > 0
    assert capsys.readouterr().out == f"{out}: the mask covers 12.5% of the image, score 0.75\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("clip_sam", None, 0, None)),
        (["--limit", "20"], ("clip_sam_limit20", 20, 0, None)),
        (["--name", "mine", "--seed", "3", "--stack", "toy", "--limit", "9"], ("mine", 9, 3, "toy")),
    ],
)
def test_benchmark(flags: list[str], expected: tuple, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("wris_lib.benchmark.run", measured := Recorder({"rows": []}))
    arguments = ["--method", "clip_sam plain", "sam box", "--data", "toyref:val", "toyref+:val"]
    assert main(["benchmark", *arguments, *flags]) == 0
    assert measured.positional == (["clip_sam plain", "sam box"], ["toyref:val", "toyref+:val"], *expected)
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (TOY_SPLITS, "benchmark", LIMIT, 0, None)),
        (["--limit", "20", "--data", "toyref:val"], (["toyref:val"], "benchmark_limit20", 20, 0, None)),
        (["--name", "mine"], (TOY_SPLITS, "mine", LIMIT, 0, None)),
    ],
)
def test_benchmark_of_all(flags: list[str], expected: tuple, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("wris_lib.benchmark.run", measured := Recorder(None))  # as in a process that only helps
    assert main(["benchmark", "--all", "--html", "page.html", *flags]) == 0
    assert measured.positional == (None, *expected) and measured.named == {"html": Path("page.html")}
    assert capsys.readouterr().out == ""


def test_benchmark_needs_something_to_measure_and_to_measure_on(capsys):
    for flags in ([], ["--all", "--method", "ppt"]):
        with pytest.raises(SystemExit, match="2"):
            main(["benchmark", "--data", "toyref:val", *flags])
    assert main(["benchmark", "--method", "ppt"]) == 2
    assert "add --data and a split, such as toyref:val" in capsys.readouterr().err


STUDIES = {
    "ablation": "wris_lib.studies.ppt.ablation",
    "study": "wris_lib.studies.ppt.study",
    "pseudo_labels": "wris_lib.studies.ppt_labels.pseudo_labels",
    "selections": "wris_lib.studies.ppt_labels.selections",
    "features": "wris_lib.studies.ppt_features.features",
    "cache_speed": "wris_lib.studies.ppt.cache_speed",
}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """What `train` may call; nothing is trained."""
    monkeypatch.delenv("WRIS_STACK", raising=False)
    functions = STUDIES | {"main": "wris_lib.methods.ppt.run.main"}
    recorders = {name: Recorder() for name in functions}
    for name, place in functions.items():
        monkeypatch.setattr(place, recorders[name])
    return recorders


def called(trained: dict[str, Recorder]) -> dict[str, tuple]:
    """What was called, and with what."""
    assert not any(getattr(recorder, "named", {}) for recorder in trained.values())
    return {name: recorder.positional for name, recorder in trained.items() if hasattr(recorder, "positional")}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("toy", "toyref:train", None, None, 0, None)),
        (["--steps", "7", "--seed", "3"], ("toy", "toyref:train", None, 7, 3, None)),
        (
            ["--stack", "paper", "--data", "refcoco:train", "--objects", "/pictures", "--folder", "/kept"],
            ("paper", "refcoco:train", Path("/pictures"), None, 0, Path("/kept")),
        ),
    ],
)
def test_train(flags: list[str], expected: tuple, trained: dict[str, Recorder]):
    assert main(["train", "ppt", *flags]) == 0
    assert called(trained) == {"main": expected}


def test_train_with_the_stack_of_the_environment(trained: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WRIS_STACK", "paper")
    assert main(["train", "ppt"]) == 0
    assert trained["main"].positional[0] == "paper"


def test_train_with_a_stack_that_is_not_there(trained: dict[str, Recorder], capsys):
    assert main(["train", "ppt", "--stack", "huge"]) == 2
    assert capsys.readouterr().err == "error: there is no stack 'huge'; choose one of: toy, paper.\n"
    assert called(trained) == {}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ablation"], {"ablation": (None, (0, 1, 2))}),
        (["--ablation", "--steps", "9", "--seed", "0"], {"ablation": (9, (0,))}),
        (["--study", "--seed", "2"], {"study": (None, (2,))}),
        (["--pseudo-labels"], {"pseudo_labels": ()}),
        (["--selections", "--steps", "9", "--seed", "1"], {"selections": (9, (1,))}),
        (["--features"], {"features": ()}),
        (["--cache-speed"], {"cache_speed": ()}),
    ],
)
def test_studies(flags: list[str], expected: dict, trained: dict[str, Recorder]):
    assert main(["train", "ppt", *flags]) == 0
    assert called(trained) == expected


@pytest.mark.parametrize("flags", [["--stack", "paper"], ["--data", "toyref+:train"], ["--folder", "x"]])
def test_a_study_refuses_what_it_does_not_heed(flags: list[str], trained: dict[str, Recorder], capsys):
    assert main(["train", "ppt", "--ablation", *flags]) == 2
    assert flags[0] in capsys.readouterr().err and called(trained) == {}


@pytest.mark.parametrize("method", ["pcnet", "tris"])
def test_train_pcnet(method: str, trained: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("wris_lib.methods.pcnet.run.main", run := Recorder())
    assert main(["train", method]) == 0
    assert run.positional == (method, "toy", None, None, 0, None)
    assert main(["train", method, "--data", "refcocog:train", "--steps", "7", "--stack", "paper", "--folder", "x"]) == 0
    assert run.positional == (method, "paper", "refcocog:train", 7, 0, Path("x"))
    assert main(["train", method, "--objects", "pictures"]) == 2
    assert "learns nothing from object-centric pictures; leave out --objects" in capsys.readouterr().err
    assert called(trained) == {}


def test_pcnet_s_study(trained: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("wris_lib.studies.pcnet.ablation", study := Recorder())
    assert main(["train", "pcnet", "--ablation", "--seed", "1"]) == 0
    assert study.positional == (None, (1,)) and called(trained) == {}
    assert main(["train", "tris", "--ablation"]) == main(["train", "pcnet", "--cache-speed"]) == 2
    assert "--ablation is a study of ppt and pcnet, not of tris" in (error := capsys.readouterr().err)
    assert "--cache-speed is a study of ppt, not of pcnet" in error


@pytest.mark.parametrize("which", ["ablation", "speed"])
def test_study(which: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"wris_lib.studies.iterprime.{which}", study := Recorder())
    assert main(["study", "iterprime", which]) == 0
    assert (study.positional, study.named) == ((), {})


@pytest.mark.parametrize("study", [[], ["--ablation"]])
def test_a_negative_seed_is_refused(study: list[str], trained: dict[str, Recorder]):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "ppt", *study, "--seed", "-1"])


@pytest.mark.parametrize("model", ["clip", "sam", "parser", "t5", "albef"])
def test_pretrain(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"wris_lib.pretrain.{model}.main", trained := Recorder())
    assert main(["pretrain", model]) == 0
    assert trained.named == {}
    assert main(["pretrain", model, "--steps", "7", "--folder", str(tmp_path)]) == 0
    assert trained.named == {"steps": 7, "folder": tmp_path}


def test_toyworld_in_the_cache(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    monkeypatch.setattr("wris_lib.data.toyworld.build.ensure", Recorder(tmp_path))
    assert main(["toyworld"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_toyworld_in_a_new_folder(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    def write(folder: Path) -> None:
        (folder / "made").touch()

    monkeypatch.setattr("wris_lib.data.toyworld.build.write_world", write)
    arguments = ["toyworld", "--out", str(tmp_path / "world")]
    assert main(arguments) == 0
    assert (tmp_path / "world" / "made").exists()
    assert main(arguments) == 2
    assert "world exists already; name a new folder." in capsys.readouterr().err
