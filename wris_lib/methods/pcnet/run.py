"""One training of PCNet, or of TRIS, from its data to a file of weights."""

import hashlib
import json
import shlex
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from wris_lib.backbones.checkpoints import WEIGHTS, record_sha256, trained_folder
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.llm import load_llm
from wris_lib.backbones.sam import load_sam
from wris_lib.backbones.trained import save_trained
from wris_lib.data import load_training
from wris_lib.errors import WrisError
from wris_lib.files import atomic_write, write_json
from wris_lib.methods.pcnet.crm import Crm, CrmConfig
from wris_lib.methods.pcnet.training import Batches, Training, TrainingData, encode, training_loss
from wris_lib.train import fit

TOY_DATA = ("toyref:train", "toyrefg:train")
STAGES = {"pcnet": CrmConfig.stages, "tris": 0}


def configure(clip: Clip, **choices: int | str) -> CrmConfig:
    """Sizes for this CLIP, and choices other than the usual ones."""
    return CrmConfig(clip.text_features([""]).shape[1], **choices)


def load_data(stack: str, splits: tuple[str, ...] = TOY_DATA, proposals: bool = True) -> TrainingData:
    """Splits with sentences, encoded.

    Args:
        stack: "toy" or "paper".
        splits: such as "refcocog:train".
        proposals: whether L_RaS needs them; SAM takes a good half hour for the toy splits on two cores.

    Raises:
        WrisError: a split or a picture is missing or damaged; the language model does not answer.
    """
    segmenter = load_sam(stack) if proposals else None
    items = [load_training(split).items for split in splits]
    return encode(stack, load_clip(stack), segmenter, load_llm(stack), load_parser(stack), items)


def train(crm: Crm, data: TrainingData, training: Training, folder: Path) -> list[dict[str, int | float]]:
    """Train in place through the shared loop; a checkpoint in `folder` is resumed. Returns the loop's log."""
    others = training.others if training.disambiguation else 0
    batches = Batches(data, crm.config.stages, others, training.seed, bool(training.region_shrinking), training.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return fit(crm, training_loss(training), batches, training.recipe, folder, device)


def main(
    method: str,
    stack: str,
    data: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> None:
    """Train, and write the weights; run again, it continues.

    The toy stack's usual run writes the library's own weights and their card; any other leaves `METHOD.safetensors` in
    `folder`.

    Args:
        method: "pcnet" or "tris".
        stack: "toy" or "paper".
        data: a split; None: the toy splits.
        steps: None: as many as the shipped weights had.
        seed: of everything drawn.
        folder: for checkpoints; None: in the cache.
    """
    usual = (stack, data, steps, seed) == ("toy", None, None, 0)
    folder = Path(folder or trained_folder(method, stack))
    clip, training = load_clip(stack), Training(seed=seed)
    if method == "tris":
        training = replace(training, region_shrinking=0.0, disambiguation=0.0)
    if steps is not None:
        training = replace(training, steps=steps)
    splits = TOY_DATA if data is None else (data,)
    everything = load_data(stack, splits, bool(training.region_shrinking))
    crm = Crm(configure(clip, stages=STAGES[method]))
    _claim(folder, everything)
    log = train(crm, everything, training, folder)
    path = (WEIGHTS if usual else folder) / f"{method}.safetensors"
    save_trained(crm, method, clip, path)
    record_sha256(path)
    flags = [] if stack == "toy" else ["--stack", stack]
    flags += [] if data is None else ["--data", data]
    flags += [] if steps is None else ["--steps", str(steps)]
    flags += ["--seed", str(seed)] if seed else []
    command = shlex.join(["python", "-m", "wris_lib", "train", method, *flags])
    with atomic_write(path.with_suffix(".md"), "w") as file:
        file.write(model_card(method, crm, everything, training, log, command, splits))
    print(path)


def _claim(folder: Path, data: TrainingData) -> None:
    """Checkpoints know their recipe, but not what they have learnt from. A file beside them does.

    Raises:
        WrisError: the folder's training is of other data or another CLIP.
    """
    digest = hashlib.sha256()
    for array in (data.visual.numpy(), data.texts.numpy(), data.sentence, data.cues, data.image, data.referent):
        digest.update(array.tobytes())
    about, path = {"data": digest.hexdigest()}, folder / "data.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != about:
        raise WrisError(
            f"{folder} holds the training of other data or another CLIP; delete it, or name another with --folder."
        )
    write_json(path, about)


def model_card(
    method: str,
    crm: Crm,
    data: TrainingData,
    training: Training,
    log: list[dict[str, int | float]],
    command: str,
    splits: tuple[str, ...],
) -> str:
    """The model card, in Markdown.

    Args:
        method: "pcnet" or "tris".
        crm: trained.
        data: that it was trained on.
        training: how.
        log: of `train`.
        command: that made it.
        splits: names of the data.
    """
    config, last = crm.config, log[-1]
    parameters = sum(p.numel() for p in crm.parameters())
    title = "PCNet's referring module" if config.stages else "TRIS: what image and sentence alone teach"
    what = f"{config.stages} stages, {config.modulation}" if config.stages else "no stages: two adapters"
    weights = f"L_RaS {training.region_shrinking:.3g}, L_IaD {training.disambiguation:.3g}"
    terms = ", ".join(f"{name} {last[name]:.3f}" for name in last if name not in ("step", "seconds", "loss"))
    return f"""# {title}

{parameters / 1e6:.2f} million parameters, all trained, in CLIP's joint space of {config.channels} channels;
{what}. CLIP and SAM stay frozen. It belongs to the CLIP whose hash is written in the file.

**Data.** {len(data.sentence)} expressions of {len(data.visual)} images ({", ".join(splits)}). No mask, box or point.

**Recipe.** `{command}`: seed {training.seed}, {training.steps} steps of {training.images} images, AdamW,
learning rate {training.learning_rate:g} with a cosine, {training.recipe.precision}; L_cls 1, {weights}.
At the end: {terms}.

**Made.** {date.today().isoformat()}, {sum(row["seconds"] for row in log) / 60:.1f} minutes of steps on
{torch.get_num_threads()} thread(s), {next(crm.parameters()).device.type}; torch {torch.__version__}.

**Figures.** Of the weights that come with the library: `results/pcnet.json`.
"""
