"""PPT's training in processes of its own: one that is killed and resumed, and two that divide the work."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from tests import processes
from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_curriculum import make_small, same_weights
from tests.methods.test_ppt_training import tiny_generator
from wris_lib.methods.ppt import curriculum
from wris_lib.methods.ppt.curriculum import Round, Training, train
from wris_lib.methods.ppt.model import PointGenerator
from wris_lib.methods.ppt.training import DATASETS

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip
segmenter, data = test_ppt_training.segmenter, test_ppt_training.data

ROUNDS = (Round(1, ("H_sem", "D_sem"), 0.5), Round(2, DATASETS, 0.5))  # the second one selects referents
KILLED = Training(steps=10, learning_rate=1e-2)
ALONE = Training(steps=4, learning_rate=1e-2, precision="fp32")
SHARED = replace(ALONE, shares=2)


def work(folder: Path, name: str, setting: Training, deadly_step: int | None = None) -> PointGenerator:
    """A training that starts with what `start.pt` holds, or goes on with what lies in the folder of that name.

    Args:
        folder: of the test.
        name: of the training's folder in it.
        setting: how to train.
        deadly_step: counted over all rounds; there the process kills itself.
    """
    generator, segmenter, data = torch.load(folder / "start.pt", weights_only=False)
    make, calls = curriculum.training_loss, []

    def deadly(*settings):
        loss = make(*settings)

        def counted(generator, batch, step):
            calls.append(step)
            if len(calls) - 1 == deadly_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(generator, batch, step)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(curriculum, "training_loss", deadly)
        list(train(generator, segmenter, data, ROUNDS, setting, folder / name))
    return generator


def work_together(folder: Path) -> None:
    work(folder, "two", SHARED)
    assert PartialState().num_processes == 2


@pytest.fixture
def folder(tmp_path, segmenter, data) -> Path:
    """With all that a training begins with, to be read by other processes."""
    torch.save((tiny_generator(), segmenter, data), tmp_path / "start.pt")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_kill_minus_nine_in_the_middle_of_a_round(folder):
    """The fourth step of the second round: one that was made since the last checkpoint is lost."""
    log = folder / "log.txt"
    assert processes.run(log, work, folder, "killed", KILLED, 8) == -signal.SIGKILL, log.read_text()
    assert files(folder / "killed") == {"round 1/checkpoint.pt", "round 2/checkpoint.pt", "round 2/referents.npy"}
    kept = torch.load(folder / "killed" / "round 2" / "checkpoint.pt", weights_only=True)
    assert len(kept["log"]) == 2
    resumed, straight = work(folder, "killed", KILLED), work(folder, "straight", KILLED)
    assert same_weights(resumed, straight) and not same_weights(straight, tiny_generator())


def test_two_processes_match_one(folder):
    """Each computes one of a batch's two shares; one process computes both, or the batch at once."""
    alone, one = work(folder, "alone", ALONE), work(folder, "one", SHARED)
    processes.run_two(folder, work_together, folder)
    assert files(folder / "two") == files(folder / "one")
    for path in sorted(files(folder / "one")):
        if path.endswith(".npy"):
            assert (folder / "two" / path).read_bytes() == (folder / "one" / path).read_bytes()
    ends = [torch.load(folder / name / "round 2" / "checkpoint.pt", weights_only=True) for name in ("one", "two")]
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, ends[0]["model"][name])
        torch.testing.assert_close(ends[1]["model"][name], tensor, atol=1e-5, rtol=1e-4)
    # At once, sums have another order. Adam divides a gradient by its size: where it is nearly 0, a single weight shows
    # rounding. All together do not.
    first, whole, both = (
        torch.cat([tensor.flatten() for tensor in generator.state_dict().values()])
        for generator in (tiny_generator(), alone, one)
    )
    assert (both - whole).norm() < 0.01 * (whole - first).norm()
    losses = [[row["loss"] for row in end["log"]] for end in ends]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert not same_weights(one, tiny_generator())
