"""One training from its data to a file of weights, in miniature: what is written where, and what is said instead."""

import hashlib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_pseudo import COLORS, ByColour, Words
from tests.methods.test_ppt_training import CONFIG
from wris_lib.backbones import checkpoints
from wris_lib.backbones.clip import Clip
from wris_lib.data.refer import Expression
from wris_lib.errors import WrisError
from wris_lib.methods.ppt import Ppt, curriculum, datasets, run, training
from wris_lib.methods.ppt.config import configure
from wris_lib.methods.ppt.curriculum import FULL, Done, Round, Training
from wris_lib.methods.ppt.loss import LossWeights
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.run import load_data, main, model_card
from wris_lib.methods.ppt.training import DATASETS, TrainingData
from wris_lib.methods.ppt.weights import load_generator, save_generator

tokenizer, clip, segmenter = test_clip.tokenizer, test_ppt_training.clip, test_ppt_training.segmenter

TEXTS = ["red dog", "blue and red", "green car", "blue car", "red left of blue"]
SIZES = {name: getattr(CONFIG, name) for name in ("fusion_width", "fusion_heads", "width", "heads", "feedforward")}
STEPS = 7  # of each round of the curriculum at least one, of the second two


class NoClipSam(ByColour):
    """Knows colours, and stands where CLIP + SAM would be."""

    def __init__(self, clip=None, segmenter=None, rule=None):
        pass


def write_objects(folder: Path, classes: dict[str, tuple[int, int, int]]) -> Path:
    """Two pictures of every class: a rectangle in its colour on grey."""
    for name, color in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((40, 40, 3), 128, dtype=np.uint8)
            pixels[10 : 25 + 5 * number, 8:30] = color
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, clip, segmenter):
    """A stack of tiny models, its data, and a cache of their own."""
    folder = tmp_path_factory.mktemp("world")
    write_objects(folder / "images" / "toyobjects" / "train", COLORS)
    pixels = np.full((60, 60, 3), 128, dtype=np.uint8)
    pixels[5:20, 5:25], pixels[30:50, 30:55] = COLORS["red"], COLORS["blue"]
    Image.fromarray(pixels).save(folder / "scene.png")
    (folder / "weights").mkdir()
    for name in ("clip.safetensors", "sam.safetensors", "parser.msgpack"):  # no more than their hashes is asked for
        (folder / "weights" / name).write_text(name)
    splits = {"toyref:train": TEXTS, "toyref+:train": TEXTS[::-1], "refcoco:train": TEXTS[:3]}

    def load_training(spec):
        texts = splits[spec]
        return SimpleNamespace(items=[Expression(folder / "scene.png", 0, n, t, n) for n, t in enumerate(texts)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRIS_CACHE", str(folder / "cache"))
        patch.setattr(checkpoints, "WEIGHTS", folder / "weights")
        patch.setattr(datasets, "ClipSam", NoClipSam)
        patch.setattr(datasets, "load_parser", lambda stack: Words())
        for name, value in (("SIZE", 64), ("COPIES", 1), ("SCENES", 4)):
            patch.setattr(datasets, name, value)
        for module in (datasets, run):
            patch.setattr(module, "load_clip", lambda stack: clip)
            patch.setattr(module, "load_sam", lambda stack: segmenter)
        patch.setattr(run, "load_training", load_training)
        patch.setattr(run.toyworld, "ensure", lambda: folder)
        patch.setattr(run, "configure", lambda clip: replace(configure(clip), queries=9, points=3, **SIZES))
        patch.setattr(run, "Training", partial(Training, steps=STEPS))
        for name, value in (("IMAGES_PER_STEP", 3), ("EXPRESSIONS_PER_IMAGE", 1), ("MASKS_PER_STEP", 1)):
            patch.setattr(training, name, value)
        patch.setattr(run, "WEIGHTS", folder / "package")
        yield folder


@pytest.fixture(scope="module")
def trial(world) -> Path:
    """The folder of a whole training."""
    main("toy", steps=STEPS, folder=world / "trial")
    return world / "trial"


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained: a round of one step leaves the generator as it was."""
    done = [Done(FULL[0], [{"step": 0, "seconds": 1.0, "loss": 2.0}], np.zeros(1, dtype=int))]
    monkeypatch.setattr(run, "train", lambda *arguments: iter(done))


# --------------------------------------------------------------------------------------------------------- the sizes


def test_sizes_are_what_this_clip_gives(clip, tokenizer):
    config = configure(clip)
    assert config.stages == (1, 2, "surgery")  # of four blocks
    assert (config.visual_channels, config.word_channels) == ((24, 24, 20), 16)
    assert (config.queries, config.points, config.anchored) == (16, 16, True)
    six = Clip(test_clip.tiny_model(layers=6), tokenizer, dense_size=32, device="cpu")
    assert configure(six).stages == (2, 4, "surgery")


@pytest.mark.parametrize(("dense_size", "zoom"), [(32, 2), (48, 2), (64, 1), (96, 1), (24, 3)])
def test_images_are_shown_at_least_twice_as_large_as_clip_knows_them(tokenizer, dense_size, zoom):
    clip = Clip(test_clip.tiny_model(), tokenizer, dense_size=dense_size, device="cpu")
    config = configure(clip)
    assert clip.native_size == 32 and (config.zoom, config.tile) == (zoom, 32)
    assert configure(clip, zoom=5).zoom == 5 and configure(clip, tile=24).tile == 24


def test_other_sizes_for_studies(clip):
    config = configure(clip, queries=5, points=2, anchored=False)
    assert (config.queries, config.points, config.anchored) == (5, 2, False)
    assert replace(config, queries=16, points=16, anchored=True) == configure(clip)
    with pytest.raises(WrisError, match="5 anchored queries do not fill a square grid"):
        configure(clip, queries=5)


def test_a_generator_of_these_sizes_reads_this_clip(clip, segmenter):
    ppt = Ppt(clip, segmenter, PointGenerator(replace(configure(clip), **SIZES)))
    assert ppt.prompts(Image.new("RGB", (40, 20)), ["the red dog"]).points.shape == (1, 16, 16, 2)


# ---------------------------------------------------------------------------------------------------------- the data


def count(data: TrainingData) -> list[int]:
    return [len(data.of([name])) for name in DATASETS]


def test_the_toy_worlds_pictures_are_the_usual_ones(world, clip):
    data = load_data("toy", clip)
    h_sem, h_ref, d_sem, d_ref = count(data)
    assert (h_sem, h_ref) == (2, 2)  # nothing green is to be found
    assert 3 <= d_sem <= 6 and d_ref >= 4
    named = {text for e, text in enumerate(data.labels.expressions) if e in data.of(["D_sem"])}
    assert named <= {f"the {name} in the middle" for name in COLORS} and len(named) > 1


def test_pictures_of_the_users_own(world, clip, tmp_path):
    """A folder of two classes, of which one's name has two words."""
    folder = write_objects(tmp_path / "mine", {"red": COLORS["red"], "blue_bird": COLORS["blue"]})
    data = load_data("toy", clip, "refcoco:train", folder)
    assert count(data)[:2] == [1, 1]  # of three sentences
    named = {text for e, text in enumerate(data.labels.expressions) if e in data.of(["D_sem"])}
    assert named == {"the red in the middle", "the blue bird in the middle"}


def test_real_sentences_need_pictures_of_real_things(world, clip):
    with pytest.raises(WrisError, match="refcoco:train needs object-centric pictures .*with --objects FOLDER"):
        load_data("toy", clip, "refcoco:train")


def test_a_folder_that_is_not_there(world, clip, tmp_path):
    with pytest.raises(WrisError, match="there is no image folder .*none; it should hold one folder a class"):
        load_data("toy", clip, objects=tmp_path / "none")


def test_a_folder_without_classes(world, clip, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png")  # lies where its class's folder should
    with pytest.raises(WrisError, match="there are no images in .*; they should lie in one folder a class"):
        load_data("toy", clip, objects=tmp_path)


def test_a_folder_with_one_class(world, clip, tmp_path):
    write_objects(tmp_path, {"red": COLORS["red"]})
    (tmp_path / "blue").mkdir()  # and no picture in it
    with pytest.raises(WrisError, match="has pictures of a single class.*at least two folders, one for each class"):
        load_data("toy", clip, objects=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "1.png is empty"),
        (b"hello", "1.png is not an image in a format that Pillow reads"),
        (None, "1.png is cut short"),
    ],
)
def test_a_picture_that_is_broken(world, clip, tmp_path, content, message):
    write_objects(tmp_path, {"red": COLORS["red"], "blue": COLORS["blue"]})
    path = tmp_path / "red" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(WrisError, match=message):
        load_data("toy", clip, objects=tmp_path)


# ----------------------------------------------------------------------------------------------------- a run in full


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same_tensors(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


CHECKPOINTS = {f"round {number}/checkpoint.pt" for number in range(1, 7)}
CHECKPOINTS |= {f"round {number}/referents.npy" for number in range(3, 7)}


def test_a_trial_stays_in_its_folder(world, trial, clip):
    assert files(trial) == CHECKPOINTS | {"data.json", "ppt.safetensors", "ppt.md", "SHA256SUMS"}
    assert not (world / "package").exists()
    trained = torch.load(trial / "round 6" / "checkpoint.pt", weights_only=True)["model"]
    written = load_generator(trial / "ppt.safetensors", clip)
    assert written.config.queries == 9
    assert all(torch.equal(tensor, trained[name].half().float()) for name, tensor in written.state_dict().items())


def test_the_usual_run_writes_the_packages_weights(world, trial, tmp_path, monkeypatch, capsys):
    """Here with as many steps as the trial had, so the weights are the same."""
    package = tmp_path / "package"
    monkeypatch.setattr(run, "WEIGHTS", package)
    package.mkdir()
    (package / "SHA256SUMS").write_text("0" * 64 + "  clip.safetensors\n")
    main("toy")
    assert files(package) == {"SHA256SUMS", "ppt.safetensors", "ppt.md"}
    assert capsys.readouterr().out == f"{package / 'ppt.safetensors'}\n"
    assert same_tensors(package / "ppt.safetensors", trial / "ppt.safetensors")
    digest = hashlib.sha256((package / "ppt.safetensors").read_bytes()).hexdigest()
    assert (package / "SHA256SUMS").read_text() == f"{'0' * 64}  clip.safetensors\n{digest}  ppt.safetensors\n"
    (folder,) = (world / "cache" / "train").iterdir()
    assert files(folder) >= CHECKPOINTS and not list(folder.glob("ppt.*"))


@pytest.mark.parametrize(
    "change", [{"stack": "paper"}, {"data": "toyref+:train"}, {"objects": "own"}, {"steps": 8000}, {"seed": 1}]
)
def test_whatever_is_not_usual_is_a_trial(world, untrained, tmp_path, monkeypatch, change):
    if "objects" in change:
        change = {"objects": write_objects(tmp_path / "own", COLORS)}
    monkeypatch.setattr(run, "load_data", lambda stack, clip, *rest: load_data("toy", clip, *rest))  # paper has none
    main(**{"stack": "toy"} | change, folder=tmp_path / "trial")
    assert files(tmp_path / "trial") >= {"ppt.safetensors", "ppt.md"}
    assert not (world / "package").exists()


def test_run_again_it_is_done_already(trial, tmp_path, monkeypatch):
    folder = copytree(trial, tmp_path / "trial")
    (folder / "ppt.safetensors").unlink()

    def step(*arguments):
        raise AssertionError("there was no step left")

    monkeypatch.setattr(curriculum, "training_loss", lambda *settings: step)
    main("toy", steps=STEPS, folder=folder)
    assert same_tensors(folder / "ppt.safetensors", trial / "ppt.safetensors")


def test_the_same_weights_are_the_same_bytes(trial, clip, tmp_path):
    """Otherwise the recorded hash says nothing about weights."""
    generator = load_generator(trial / "ppt.safetensors", clip)
    for number in range(8):
        save_generator(generator, clip, tmp_path / str(number))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_only_one_of_several_processes_writes(world, untrained, tmp_path, monkeypatch, capsys):
    second = SimpleNamespace(is_main_process=False, num_processes=1)
    monkeypatch.setattr(run, "PartialState", lambda *arguments, **options: second)
    main("toy", folder=tmp_path / "trial")
    assert list(tmp_path.rglob("ppt.*")) == [] and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_no_number(world, tmp_path, monkeypatch):
    loss = nn.Parameter(torch.tensor(torch.nan))
    monkeypatch.setattr(curriculum, "training_loss", lambda *settings: lambda *batch: {"loss": 1 * loss})
    with pytest.raises(WrisError, match="the loss became nan at step 0; train slower or in fp32"):
        main("toy", steps=STEPS, folder=tmp_path / "trial")
    assert list(tmp_path.rglob("ppt.*")) == []


def test_predictions_that_are_no_numbers(world, tmp_path, monkeypatch):
    """As a training leaves them that has run away."""

    def start(*arguments):
        generator = training.start(*arguments)
        nn.init.constant_(generator.point_head[-1].bias, torch.nan)
        return generator

    monkeypatch.setattr(run, "start", start)
    with pytest.raises(WrisError, match="predictions are no longer finite numbers; train with a lower learning rate"):
        main("toy", steps=STEPS, folder=tmp_path / "trial")
    assert list(tmp_path.rglob("ppt.*")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"steps": 20},
            r"of another recipe \(steps 2 instead of 5, .*\); delete .*round 1 to start over, or name another",
        ),
        ({"seed": 3}, r"of another recipe \(seed 0 instead of 300\)"),
    ],
)
def test_a_checkpoint_of_another_recipe(trial, change, message):
    with pytest.raises(WrisError, match=message):
        main("toy", **{"steps": STEPS} | change, folder=trial)


@pytest.mark.parametrize("change", [{"points": 2}, {"width": 24}, {"anchored": False}])
def test_a_checkpoint_of_another_size(trial, monkeypatch, change):
    small = run.configure
    monkeypatch.setattr(run, "configure", lambda clip: replace(small(clip), **change))
    with pytest.raises(WrisError, match="checkpoint.pt is of another model; delete .* to start over"):
        main("toy", steps=STEPS, folder=trial)


# --------------------------------------------------------------------------------------------------------- the card


def sentences(card: str) -> str:
    return " ".join(card.split())


def test_the_card_of_a_run(trial, clip):
    """Its figures are those of the training's own files."""
    card = (trial / "ppt.md").read_text()
    checkpoints = [trial / f"round {number}" / "checkpoint.pt" for number in range(1, len(FULL) + 1)]
    logs = [torch.load(path, weights_only=True)["log"] for path in checkpoints]
    rows = re.findall(r"^\| (\d) \| (.+) \| (\d+) \| (.+) \|$", card, re.MULTILINE)
    expected = [
        (str(each.stage), " ∪ ".join(each.datasets), str(len(log)), f"{log[-1]['loss']:.2f}")
        for each, log in zip(FULL, logs, strict=True)
    ]
    assert rows == expected and [row[2] for row in rows] == ["2", "2", "1", "1", "1", "1"]
    text = sentences(card)
    numbers = sum(tensor.numel() for n, tensor in load_file(trial / "ppt.safetensors").items() if "whiten" not in n)
    assert f"{numbers / 1e6:.2f} million parameters" in text
    counts = zip(count(load_data("toy", clip)), DATASETS, strict=True)
    assert ", ".join(f"{number} {name}" for number, name in counts) in text
    assert f"on {torch.get_num_threads()} thread(s) in each of 1 process(es), cpu; torch {torch.__version__}" in text


def test_every_figure_of_the_card_is_this_runs(world, clip):
    config = replace(configure(clip, queries=5, points=2, anchored=False), **SIZES)
    weights = LossWeights(dice=0.25, mask=0.5, points=4.5, labels=0.75, score=0.125)
    setting = Training(steps=9, learning_rate=3e-4, seed=5, weights=weights, precision="fp32")
    log = [{"step": n, "seconds": 90.0, "loss": 8.0 - n} for n in range(3)]
    done = [Done(Round(2, ("H_sem", "D_ref"), 1.0), log, np.zeros(1, dtype=int))]
    text = sentences(model_card(PointGenerator(config), load_data("toy", clip), setting, done))
    assert "K = 5 queries of M = 2 points, free; CLIP's stages 1, 2, surgery" in text
    assert "seed 5, AdamW, learning rate 0.0003 with a cosine in every round, fp32" in text
    assert "DICE 0.25, mask 0.5, points 4.5, labels 0.75, score 0.125" in text
    assert "| 2 | H_sem ∪ D_ref | 3 | 6.00 |" in text
    assert ", 4 minutes of steps on" in text  # three steps of a minute and a half, rounded to even


def test_a_trials_card_does_not_pretend_to_be_the_usual_runs(trial):
    text = sentences((trial / "ppt.md").read_text())
    assert "ppt.json" not in text  # which was made with other weights
    assert f"`python -m wris_lib train ppt --steps {STEPS}`" in text


# ------------------------------------------------------------------------------------- what belongs to something else


def test_a_folder_of_other_sentences(trial):
    with pytest.raises(WrisError, match="holds the training of other data or models; delete it, or name another"):
        main("toy", "toyref+:train", steps=STEPS, folder=trial)


def test_a_folder_of_another_clip(trial, tokenizer, monkeypatch):
    other = Clip(test_clip.tiny_model(quick_gelu=True), tokenizer, dense_size=32, device="cpu")
    for module in (datasets, run):
        monkeypatch.setattr(module, "load_clip", lambda stack: other)
    with pytest.raises(WrisError, match="holds the training of other data or models"):
        main("toy", steps=STEPS, folder=trial)
