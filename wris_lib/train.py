"""One loop for everything that trains.

A training run is described by three pure things: a model, a `loss(model, batch, step)`, and `batches(step)`,
which gives the batch of a step as a function of the step alone. There is no data loader whose position could
be lost, and torch's generator is seeded anew at every step. That is why a run which was killed and started
again ends with exactly the weights of a run that was never interrupted.

Several processes share a run when Hugging Face accelerate (or torchrun) starts them. A step's batch comes in
`Recipe.shares` shares; one process computes them one after another, several divide them among themselves. The
gradient is the mean over the shares either way.
"""

import math
import pickle
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from wris_lib.errors import WrisError
from wris_lib.files import atomic_write

Loss = Callable[[nn.Module, Any, int], dict[str, Tensor]]
GRADIENT_NORM = 1.0  # gradients are clipped to this norm, as is usual for transformers


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but model and data.

    Args:
        steps: optimiser steps in total.
        learning_rate: the peak, reached after `warmup` steps; a cosine leads from there to 0.
        weight_decay: AdamW's; matrices only, never biases, norms or scalars.
        warmup: steps of linear warm-up.
        seed: of every random number drawn inside the loss. The initial weights are the caller's to seed.
        precision: "bf16" runs the loss under autocast, weights stay float32; "fp32" does not.
        checkpoint_every: steps between checkpoints, the most that a kill can cost.
        shares: into how many shares the batch of a step is cut; as many processes can divide the work.
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: int = 0
    seed: int = 0
    precision: str = "fp32"
    checkpoint_every: int = 500
    shares: int = 1

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp32"):
            raise WrisError(f"precision is {self.precision!r}; expected 'bf16' or 'fp32'.")
        if min(self.steps, self.checkpoint_every, self.shares) < 1:
            raise WrisError("a recipe needs at least one step and one share, and a checkpoint every so many steps.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Any],
    recipe: Recipe,
    folder: Path,
    device: str | torch.device = "cpu",
) -> list[dict[str, int | float]]:
    """Train `model` in place and keep a checkpoint in `folder`; a checkpoint found there is resumed.

    Ctrl-C ends the step at hand, saves, and raises KeyboardInterrupt; `kill -9` loses at most
    `recipe.checkpoint_every` steps. In both cases the same call continues, and on a CPU its result equals
    that of an uninterrupted run bit for bit.

    Args:
        model: parameters that do not require gradients stay frozen.
        loss: gives named scalar terms, of which "loss" is minimised and the others are only logged.
        batches: the share of a batch with a given number, as a pure function of that number: share i of step s
            has the number s · recipe.shares + i, so with one share it is the step, counted from 0. Tensors in it,
            also inside dicts, lists and tuples, are moved to `device`.
        recipe: how to train.
        folder: where `checkpoint.pt` is written, by the main process.
        device: where to train.

    Returns:
        One dict a step: "step", "seconds" and the loss's terms, as means over the shares.

    Raises:
        WrisError: the checkpoint is damaged or of another recipe or model; loss or gradient is no longer finite; the
            processes cannot divide the shares evenly.
    """
    device = torch.device(device)
    processes = PartialState(cpu=device.type == "cpu")
    if recipe.shares % processes.num_processes:
        raise WrisError(
            f"{processes.num_processes} processes cannot divide a batch of {recipe.shares} shares evenly; start "
            f"{recipe.shares} processes, or a number that divides it."
        )
    own_shares = range(processes.process_index, recipe.shares, processes.num_processes)
    path = Path(folder) / "checkpoint.pt"
    model.to(device).train()
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
    log = _resume(path, model, optimizer, recipe) if path.exists() else []
    if len(log) == recipe.steps and processes.is_main_process:
        print(f"{path} is finished already; delete {path.parent} to train anew.")

    def save() -> None:
        content = {
            "recipe": asdict(recipe),
            "log": log,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        with atomic_write(path) as file:
            torch.save(content, file)

    bar = tqdm(
        range(len(log), recipe.steps),
        initial=len(log),
        total=recipe.steps,
        unit="step",
        mininterval=1.0,
        disable=not processes.is_main_process,
    )
    with (
        bar,
        _held_interrupt() as interrupted,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        for step in bar:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.zero_grad(set_to_none=True)
            values: dict[str, float] = {}
            for number in (step * recipe.shares + share for share in own_shares):
                torch.manual_seed(recipe.seed * 1_000_003 + number)
                batch = move(batches(number), device)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    terms = loss(model, batch, step)
                (terms["loss"] / recipe.shares).backward()
                for name, term in terms.items():
                    values[name] = values.get(name, 0.0) + term.item() / recipe.shares
            stop = interrupted.is_set()
            if processes.num_processes > 1:
                values, stop = _synchronise(model, values, stop)
            norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM).item()
            for name, value in (("loss", values["loss"]), ("gradient's norm", norm)):
                if not math.isfinite(value):
                    kept = f" The last good state is in {path}." if path.exists() else ""
                    raise WrisError(f"the {name} became {value} at step {step}; train slower or in fp32.{kept}")
            optimizer.step()
            log.append({"step": step, "seconds": time.perf_counter() - start, **values})
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            last = step + 1 == recipe.steps
            if processes.is_main_process and (last or stop or (step + 1) % recipe.checkpoint_every == 0):
                save()
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {step}; run the same command again to continue.")
    processes.wait_for_everyone()
    return log


def _synchronise(model: nn.Module, values: dict[str, float], stop: bool) -> tuple[dict[str, float], bool]:
    """Sum gradients and logged values over the processes, in one message; any of them can ask for a stop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    numbers = torch.tensor([*values.values(), float(stop)], device=gradients[0].device)
    summed = reduce(torch.cat([*(g.flatten() for g in gradients), numbers]), reduction="sum")
    *flat, numbers = summed.split([*(p.numel() for p in trained), len(numbers)])
    for parameter, gradient in zip(trained, flat, strict=True):
        parameter.grad = gradient.view_as(parameter)
    *sums, stops = numbers.tolist()
    return dict(zip(values, sums, strict=True)), stops > 0


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> list[dict[str, int | float]]:
    """Load a checkpoint into model and optimiser; returns its log."""
    start_over = f"delete {path.parent} to start over, or name another folder."
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, log, weights = content["recipe"], content["log"], content["model"]
        state = content["optimizer"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise WrisError(f"the checkpoint {path} is damaged; {start_over}") from error
    if found != asdict(recipe):
        wanted = asdict(recipe)
        differences = [
            f"{name} {found.get(name)!r} instead of {wanted[name]!r}"
            for name in wanted
            if found.get(name) != wanted[name]
        ]
        raise WrisError(f"the checkpoint {path} is of another recipe ({', '.join(differences)}); {start_over}")
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise WrisError(f"the checkpoint {path} is of another model; {start_over}") from error
    return log


@contextmanager
def _held_interrupt() -> Iterator[threading.Event]:
    """Let a first Ctrl-C wait for the end of the step; a second acts at once.

    An update that was cut in half could not be resumed. Only a main thread receives signals; elsewhere
    nothing is changed.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def move(batch: Any, device: torch.device) -> Any:
    """Every tensor in a batch on a device; dicts, lists and tuples are looked into."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: move(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    return batch
