"""The training loop: resume is exact, interruptions lose nothing, and errors say what to do."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import processes
from wris_lib import train
from wris_lib.errors import WrisError
from wris_lib.train import Recipe, fit

RECIPE = Recipe(steps=12, learning_rate=1e-2, warmup=3, seed=5, checkpoint_every=4)


def make_model(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))


def batches(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def loss(model, batch, step):
    error = (model(batch["x"]) - batch["y"]).square().mean()
    return {"loss": error, "root": error.detach().sqrt()}


def without_time(log):
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stop_at(step):
    """Batches that break the run like a crash when `step` is reached."""

    def broken(number):
        if number == step:
            raise RuntimeError("power cut")
        return batches(number)

    return broken


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, precision):
    recipe = replace(RECIPE, precision=precision)
    straight, resumed = make_model(), make_model()
    log = fit(straight, loss, batches, recipe, tmp_path / "a")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(resumed, loss, stop_at(10), recipe, tmp_path / "b")  # after the checkpoint of step 8
    resumed = make_model()
    resumed_log = fit(resumed, loss, batches, recipe, tmp_path / "b")
    assert same_weights(straight, resumed)
    assert without_time(log) == without_time(resumed_log)
    assert [entry["step"] for entry in log] == list(range(12))


def train_until_killed(folder):
    def deadly(step):
        if step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(step)

    fit(make_model(), loss, deadly, RECIPE, folder)


def test_kill_minus_nine_leaves_a_whole_checkpoint_and_no_debris(tmp_path):
    log = tmp_path / "log.txt"
    assert processes.run(log, train_until_killed, tmp_path / "b") == -signal.SIGKILL, log.read_text()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint.pt"]
    straight, resumed = make_model(), make_model()
    fit(straight, loss, batches, RECIPE, tmp_path / "a")
    fit(resumed, loss, batches, RECIPE, tmp_path / "b")
    assert same_weights(straight, resumed)


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path):
    def interrupted(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
        fit(make_model(), loss, interrupted, RECIPE, tmp_path / "b")
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["log"]) == 6
    straight, resumed = make_model(), make_model()
    fit(straight, loss, batches, RECIPE, tmp_path / "a")
    fit(resumed, loss, batches, RECIPE, tmp_path / "b")
    assert same_weights(straight, resumed)


def test_finished_run_is_loaded_not_trained_again(tmp_path):
    model = make_model()
    log = fit(model, loss, batches, RECIPE, tmp_path)
    again = make_model()
    assert fit(again, loss, stop_at(0), RECIPE, tmp_path) == log
    assert same_weights(model, again)


def test_training_learns_and_leaves_the_callers_random_state_alone(tmp_path):
    model = make_model(32)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    log = fit(model, loss, batches, replace(RECIPE, steps=200), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert sum(e["loss"] for e in log[-20:]) < 0.5 * sum(e["loss"] for e in log[:20])


def test_schedule_warms_up_and_ends_near_zero():
    rates = [RECIPE.rate(step) for step in range(RECIPE.steps)]
    assert rates[0] == pytest.approx(1e-2 / 3) and max(rates) == pytest.approx(1e-2)
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 5e-4


def test_frozen_parameters_stay(tmp_path):
    model = make_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, loss, batches, RECIPE, tmp_path)
    assert torch.equal(model[0].weight, before)


def test_another_recipe_is_refused(tmp_path):
    fit(make_model(), loss, batches, RECIPE, tmp_path)
    with pytest.raises(WrisError, match="another recipe .*learning_rate 0.01 instead of 0.5.*delete"):
        fit(make_model(), loss, batches, replace(RECIPE, learning_rate=0.5), tmp_path)


def test_another_model_is_refused(tmp_path):
    fit(make_model(), loss, batches, RECIPE, tmp_path)
    with pytest.raises(WrisError, match="another model"):
        fit(make_model(width=9), loss, batches, RECIPE, tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_damaged_checkpoint_is_refused(tmp_path, keep):
    fit(make_model(), loss, batches, RECIPE, tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WrisError, match="damaged"):
        fit(make_model(), loss, batches, RECIPE, tmp_path)


def test_diverged_loss_is_named(tmp_path):
    def nan(model, batch, step):
        return {"loss": model(batch["x"]).sum() * float("nan")}

    with pytest.raises(WrisError, match="the loss became nan at step 0"):
        fit(make_model(), nan, batches, RECIPE, tmp_path)


def test_a_gradient_without_bounds_is_named_before_it_does_harm(tmp_path):
    def steep(model, batch, step):
        """At its end the slope of a root is infinite, its value is not."""
        return {"loss": (model(batch["x"]) * float(step < 4)).abs().sum().sqrt()}

    with pytest.raises(WrisError, match="the gradient's norm became .* at step 4; .* The last good state is in"):
        fit(make_model(), steep, batches, RECIPE, tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(weights.isfinite().all() for weights in kept["model"].values()) and len(kept["log"]) == 4


def test_a_finished_training_says_so(tmp_path, capsys):
    log = fit(make_model(), loss, batches, RECIPE, tmp_path)
    assert capsys.readouterr().out == ""
    assert fit(make_model(), loss, batches, RECIPE, tmp_path) == log
    finished = f"{tmp_path / 'checkpoint.pt'} is finished already; delete {tmp_path} to train anew.\n"
    assert capsys.readouterr().out == finished


def test_shares_are_one_larger_batch(tmp_path):
    def whole(step):
        shares = [batches(2 * step + i) for i in range(2)]
        return {name: torch.cat([share[name] for share in shares]) for name in "xy"}

    recipe = replace(RECIPE, shares=2)
    cut, at_once = (nn.Sequential(nn.Linear(4, 1)) for _ in range(2))
    cut.load_state_dict(at_once.state_dict())
    log = fit(cut, loss, batches, recipe, tmp_path / "cut")
    other = fit(at_once, loss, whole, RECIPE, tmp_path / "whole")
    for a, b in zip(cut.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in other])


def unused_in_even_shares(model, batch, step):
    return loss(model if batch["odd"] else model[:3], batch, step)


def numbered(number):
    return batches(number) | {"odd": number % 2}


def launch(script):
    """`accelerate launch`, with two processes."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch_command(launch_command_parser().parse_args([*options, "--main_process_port=0", str(script)]))


def test_two_processes_match_one(tmp_path):
    one = make_model().append(nn.Linear(1, 1))  # of two processes one has no gradient for the last layer
    initial = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    torch.save(initial, tmp_path / "initial.pt")
    recipe = replace(RECIPE, shares=2)
    log = fit(one, unused_in_even_shares, numbered, recipe, tmp_path / "one")

    script, said = tmp_path / "script.py", tmp_path / "log.txt"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.test_train import *
model = make_model().append(nn.Linear(1, 1))
model.load_state_dict(torch.load({str(tmp_path / "initial.pt")!r}, weights_only=True))
fit(model, unused_in_even_shares, numbered, replace(RECIPE, shares=2), {str(tmp_path / "two")!r})
""")
    assert processes.run(said, launch, script) == 0, said.read_text()

    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, two["model"][name], atol=1e-5), name
        assert not torch.equal(tensor, initial[name]), name
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in two["log"]], rel=1e-4)


def test_every_tensor_of_a_batch_is_moved():
    batch = {"x": torch.ones(2), "more": [torch.zeros(1), ("word", None, torch.ones(3))], "number": 4}
    moved = train.move(batch, torch.device("meta"))
    assert moved["x"].is_meta and moved["more"][0].is_meta and moved["more"][1][2].is_meta
    assert type(moved["more"][1]) is tuple and moved["more"][1][:2] == ("word", None) and moved["number"] == 4
    assert not batch["x"].is_meta  # the caller's are left as they were


def test_processes_that_cannot_divide_the_batch_evenly(tmp_path, monkeypatch):
    class Three:
        num_processes, process_index, is_main_process = 3, 0, True

    monkeypatch.setattr(train, "PartialState", lambda cpu: Three)
    with pytest.raises(WrisError, match="3 processes cannot divide a batch of 2 shares evenly; start 2 processes"):
        fit(make_model(), loss, batches, replace(RECIPE, shares=2), tmp_path)


@pytest.mark.parametrize("change", [{"shares": 0}, {"precision": "fp8"}, {"steps": 0}, {"checkpoint_every": 0}])
def test_impossible_recipe(change):
    with pytest.raises(WrisError):
        replace(RECIPE, **change)
