"""One training of PPT from its data to a file of weights."""

import hashlib
import json
import shlex
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from accelerate import PartialState

from wris_lib.backbones.checkpoints import WEIGHTS, record_sha256, trained_folder
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.sam import load_sam
from wris_lib.data import load_training, toyworld
from wris_lib.data.objects import ObjectImages
from wris_lib.errors import WrisError
from wris_lib.files import atomic_write, write_json
from wris_lib.methods.ppt.config import GeneratorConfig, configure
from wris_lib.methods.ppt.curriculum import CURRICULA, Done, Training, train
from wris_lib.methods.ppt.datasets import training_data
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.training import DATASETS, TrainingData, start
from wris_lib.methods.ppt.weights import save_generator

TOY_DATA = "toyref:train"


def load_data(stack: str, clip: Clip, data: str = TOY_DATA, objects: Path | None = None) -> TrainingData:
    """All four datasets of a stack.

    Args:
        stack: "toy" or "paper".
        clip: the stack's.
        data: split with expressions, such as "refcoco:train".
        objects: folder of object-centric pictures, one folder a class; None: ToyObjects.

    Raises:
        WrisError: a split, a folder or a picture is missing or damaged.
    """
    if objects is None and not data.startswith("toy"):
        raise WrisError(f"{data} needs object-centric pictures of real things: name a folder with --objects FOLDER.")
    folder = objects or toyworld.ensure() / "images" / "toyobjects" / "train"
    pictures = ObjectImages(folder).items
    if len({picture.class_name for picture in pictures}) < 2:
        raise WrisError(
            f"{folder} has pictures of a single class; scenes are composed of several, so that there is something to"
            " tell apart: expected at least two folders, one for each class."
        )
    return training_data(stack, configure(clip), load_training(data).items, pictures)


def main(
    stack: str,
    data: str = TOY_DATA,
    objects: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> None:
    """Train a generator through the full curriculum and write it; run again, it continues.

    The toy stack's usual run writes the library's own weights and their card; any other one leaves `ppt.safetensors`
    in `folder`.

    Args:
        stack: "toy" or "paper".
        data: see `load_data`.
        objects: see `load_data`.
        steps: None: as many as the shipped weights had.
        seed: of everything drawn.
        folder: for checkpoints; None: in the cache.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())  # before any model: it says on which GPU
    usual = (stack, data, objects, steps, seed) == ("toy", TOY_DATA, None, None, 0)
    folder = Path(folder or trained_folder("ppt", stack))
    clip, segmenter = load_clip(stack), load_sam(stack)
    everything = load_data(stack, clip, data, objects)
    generator = start(configure(clip), seed, everything)
    _claim(folder, everything, generator.config)
    training = Training(seed=seed, shares=processes.num_processes)
    if steps is not None:
        training = replace(training, steps=steps)
    done = list(train(generator, segmenter, everything, CURRICULA["full"], training, folder, segmenter.device))
    if not processes.is_main_process:
        return
    path = (WEIGHTS if usual else folder) / "ppt.safetensors"
    save_generator(generator, clip, path)
    record_sha256(path)
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(
            model_card(generator, everything, training, done, _command(stack, data, objects, steps, seed), usual)
        )
    print(f"{path}")


def _claim(folder: Path, data: TrainingData, config: GeneratorConfig) -> None:
    """Checkpoints know their recipe, but not what they have learnt from. A file beside them does.

    Raises:
        WrisError: the folder's training is of other data or models.
    """
    labels = hashlib.sha256("\n".join(data.labels.expressions).encode())
    for array in (data.labels.image, data.labels.first, data.labels.masks, data.labels.referent):
        labels.update(array.tobytes())
    stores = (*data.patches.stores, *data.embeddings.stores, data.words)
    about: dict = {"features": [store.folder.name for store in stores], "labels": labels.hexdigest()}
    about["queries"] = config.queries  # the one size that weights do not show
    path = folder / "data.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != about:
        raise WrisError(
            f"{folder} holds the training of other data or models; delete it, or name another with --folder."
        )
    write_json(path, about)


def _command(stack: str, data: str, objects: Path | None, steps: int | None, seed: int) -> str:
    flags = [] if stack == "toy" else ["--stack", stack]
    flags += [] if data == TOY_DATA else ["--data", data]
    flags += [] if objects is None else ["--objects", str(objects)]
    flags += [] if steps is None else ["--steps", str(steps)]
    flags += ["--seed", str(seed)] if seed else []
    return shlex.join(["python", "-m", "wris_lib", "train", "ppt", *flags])


def model_card(
    generator: PointGenerator,
    data: TrainingData,
    training: Training,
    done: list[Done],
    command: str = "python -m wris_lib train ppt",
    usual: bool = True,
) -> str:
    """The model card, in Markdown.

    Args:
        generator: trained.
        data: that it was trained on.
        training: how.
        done: all rounds.
        command: that made it.
        usual: the weights are those that come with the library, of which there are figures.
    """
    config, weights = generator.config, training.weights
    minutes = sum(row["seconds"] for each in done for row in each.log) / 60
    counts = ", ".join(f"{len(data.of([name]))} {name}" for name in DATASETS)
    rows = "\n".join(
        f"| {each.round.stage} | {' ∪ '.join(each.round.datasets)} | {len(each.log)} | {each.log[-1]['loss']:.2f} |"
        for each in done
    )
    figures = "\n**Figures.** In `results/ppt.json`.\n" if usual else ""
    return f"""# PPT's point generator

{generator.trainable_parameters / 1e6:.2f} million parameters, all trained; CLIP and SAM stay frozen.
K = {config.queries} queries of M = {config.points} points, {"anchored on a grid" if config.anchored else "free"};
CLIP's stages {", ".join(map(str, config.stages))}. It belongs to the CLIP whose hash is written in the file.

**Data.** Expressions with pseudo-labels: {counts}. No drawn mask was used.

**Recipe.** `{command}`: seed {training.seed}, AdamW, learning rate {training.learning_rate:g} with a
cosine in every round, {training.precision}; weights of the loss: DICE {weights.dice:g}, mask {weights.mask:g}, points
{weights.points:g}, labels {weights.labels:g}, score {weights.score:g}.

| stage | data | steps | loss at the end |
|---|---|---|---|
{rows}

**Made.** {date.today().isoformat()}, {minutes:.0f} minutes of steps on {torch.get_num_threads()} thread(s) in each of
{PartialState().num_processes} process(es), {next(generator.parameters()).device.type}; torch {torch.__version__}.
{figures}"""
