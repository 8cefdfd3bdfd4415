"""One training of PCNet and of TRIS from its data to a file of weights, in miniature: what is written where."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_pcnet_training import pairs
from wris_lib.backbones.trained import load_trained
from wris_lib.errors import WrisError
from wris_lib.methods.pcnet import run
from wris_lib.methods.pcnet.crm import Crm, CrmConfig
from wris_lib.methods.pcnet.run import configure, main, model_card
from wris_lib.methods.pcnet.training import Training

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip

STEPS = 3


@pytest.fixture
def asked(clip, monkeypatch) -> list[tuple]:
    """Data of random numbers for every split; what was asked for is kept."""
    data, calls = pairs([[0, 1]] * 30 + [[0]] * 7, channels=20), []

    def load_data(*arguments):
        calls.append(arguments)
        return data

    monkeypatch.setattr(run, "load_data", load_data)
    monkeypatch.setattr(run, "load_clip", lambda stack: clip)
    return calls


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The library's own weights."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "SHA256SUMS").write_text("0" * 64 + "  clip.safetensors\n")
    monkeypatch.setattr(run, "WEIGHTS", folder)
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read(path: Path, method: str, clip) -> Crm:
    return load_trained(path, method, clip, lambda config: Crm(CrmConfig(**config)), "train")


def sentences(card: str) -> str:
    return " ".join(card.split())


@pytest.mark.parametrize(("method", "stages"), [("pcnet", 2), ("tris", 0)])
def test_a_trial_stays_in_its_folder(asked, package, clip, tmp_path, capsys, method, stages):
    folder = tmp_path / "trial"
    main(method, "toy", steps=STEPS, seed=4, folder=folder)
    path = folder / f"{method}.safetensors"
    assert files(folder) >= {"checkpoint.pt", f"{method}.safetensors", f"{method}.md"} and files(package) == {
        "SHA256SUMS"
    }
    assert capsys.readouterr().out == f"{path}\n"
    assert asked == [("toy", run.TOY_DATA, bool(stages))]  # only L_RaS needs proposals
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    written = read(path, method, clip)
    assert written.config == CrmConfig(20, stages)
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name].half().float())
    assert set(checkpoint["log"][0]) == {"step", "seconds", "loss", "cls", *(["ras", "iad"] if stages else [])}

    text = sentences((folder / f"{method}.md").read_text())
    numbers = sum(tensor.numel() for tensor in load_file(path).values())
    assert f"{numbers / 1e6:.2f} million parameters, all trained, in CLIP's joint space of 20 channels" in text
    assert ("2 stages, TTA" if stages else "no stages: two adapters") in text
    assert "67 expressions of 37 images (toyref:train, toyrefg:train)" in text
    assert f"`python -m wris_lib train {method} --steps 3 --seed 4`: seed 4, 3 steps of 36 images" in text
    for name in ("cls", "ras", "iad") if stages else ("cls",):
        assert f"{name} {checkpoint['log'][-1][name]:.3f}" in text
    assert f"on {torch.get_num_threads()} thread(s), cpu; torch {torch.__version__}" in text


def test_the_usual_run_writes_the_packages_weights(asked, package, tmp_path, monkeypatch, clip):
    monkeypatch.setattr(run, "Training", lambda seed: Training(steps=STEPS, seed=seed))
    main("tris", "toy")
    assert files(package) == {"SHA256SUMS", "tris.safetensors", "tris.md"}
    digest = hashlib.sha256((package / "tris.safetensors").read_bytes()).hexdigest()
    assert (package / "SHA256SUMS").read_text() == f"{'0' * 64}  clip.safetensors\n{digest}  tris.safetensors\n"
    assert files(tmp_path / "cache") >= {"train/tris-toy/checkpoint.pt"}
    assert "`python -m wris_lib train tris`: seed 0" in sentences((package / "tris.md").read_text())


@pytest.mark.parametrize("change", [{"stack": "paper"}, {"data": "refcoco:train"}, {"steps": 2}, {"seed": 1}])
def test_whatever_is_not_usual_is_a_trial(asked, package, tmp_path, monkeypatch, change):
    monkeypatch.setattr(run, "Training", lambda seed: Training(steps=STEPS, seed=seed))
    main("pcnet", **{"stack": "toy"} | change, folder=tmp_path / "trial")
    assert files(tmp_path / "trial") >= {"pcnet.safetensors", "pcnet.md"} and files(package) == {"SHA256SUMS"}
    name, value = next(iter(change.items()))
    assert f"train pcnet --{name} {value}`" in sentences((tmp_path / "trial" / "pcnet.md").read_text())
    assert asked[0][1] == (("refcoco:train",) if "data" in change else run.TOY_DATA)


def test_run_again_it_is_done_already(asked, package, tmp_path, monkeypatch):
    folder = tmp_path / "trial"
    main("pcnet", "toy", steps=STEPS, folder=folder)
    before = (folder / "pcnet.safetensors").read_bytes()

    def step(*arguments):
        raise AssertionError("there was no step left")

    monkeypatch.setattr(run, "training_loss", lambda training: step)
    main("pcnet", "toy", steps=STEPS, folder=folder)
    assert (folder / "pcnet.safetensors").read_bytes() == before
    with pytest.raises(WrisError, match=r"of another recipe \(steps 3 instead of 5.*delete .* to start over"):
        main("pcnet", "toy", steps=5, folder=folder)


def test_every_figure_of_the_card_is_this_runs(clip):
    crm = Crm(configure(clip, stages=3, modulation="VTA+ADD"))
    setting = Training(steps=9, learning_rate=3e-4, seed=5, region_shrinking=0.25, disambiguation=0.5, images=12)
    log = [{"step": n, "seconds": 75.0, "loss": 3.0, "cls": 1.0 - n / 4, "iad": 0.5} for n in range(2)]
    text = sentences(model_card("pcnet", crm, pairs([[0, 1], [0]]), setting, log, "the command", ("a:train",)))
    assert "3 stages, VTA+ADD" in text and "3 expressions of 2 images (a:train)" in text
    assert "`the command`: seed 5, 9 steps of 12 images, AdamW, learning rate 0.0003 with a cosine, bf16" in text
    assert "L_cls 1, L_RaS 0.25, L_IaD 0.5" in text and "At the end: cls 0.750, iad 0.500." in text
    assert ", 2.5 minutes of steps on" in text


def test_sizes_are_this_clips(clip):
    assert configure(clip) == CrmConfig(20)
    assert configure(clip, stages=4) == replace(configure(clip), stages=4)


def test_the_shipped_cards_speak_of_the_shipped_weights():
    """Number of parameters and stages."""
    for method, stages in run.STAGES.items():
        path = Path(run.__file__).parents[2] / "weights" / f"{method}.safetensors"
        numbers = sum(tensor.numel() for tensor in load_file(path).values())
        text = sentences(path.with_suffix(".md").read_text())
        assert f"{numbers / 1e6:.2f} million parameters" in text
        assert re.search(r"(\d) stages," if stages else "(no) stages:", text)[1] == (str(stages) if stages else "no")


def test_a_folder_belongs_to_its_data(asked, package, clip, tmp_path, monkeypatch):
    main("tris", "toy", steps=STEPS, folder=tmp_path / "trial")
    before = (tmp_path / "trial" / "tris.safetensors").read_bytes()
    monkeypatch.setattr(run, "load_data", lambda *arguments: pairs([[0, 1]] * 40, channels=20))
    with pytest.raises(WrisError, match="holds the training of other data or another CLIP; delete it, or name another"):
        main("tris", "toy", data="toyref:train", steps=STEPS, folder=tmp_path / "trial")
    assert (tmp_path / "trial" / "tris.safetensors").read_bytes() == before
