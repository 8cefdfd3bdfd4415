"""Who takes part: all that a stack has the models for, and nobody is lost without a word."""

import pytest

from tests import fake_benchmark
from tests.fake_benchmark import Fake
from wris_lib import contestants, methods
from wris_lib.contestants import Contestant, everyone
from wris_lib.errors import WrisError


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fake_benchmark.install(tmp_path, monkeypatch.setattr)


@pytest.mark.parametrize("stack", ["toy", "paper"])
def test_everyone_and_the_oracle_last(fakes, stack):
    assert everyone(stack) == (["fake", "sam box"], {})


def test_what_a_stack_does_not_have_leaves_a_method_out(fakes, monkeypatch):
    monkeypatch.setattr(Fake, "parts", ("clip", "ppt", "tris"))
    assert everyone("toy") == (["fake", "sam box"], {})
    assert everyone("paper") == (["sam box"], {"fake": "the paper stack has no ppt and no tris weights"})


def test_what_should_be_there_and_is_not_is_an_error(fakes, monkeypatch):
    def missing(checkpoint):
        raise WrisError(f"{checkpoint.file} is missing; install the library again.")

    monkeypatch.setattr(contestants, "checkpoint_path", missing)
    with pytest.raises(WrisError, match="clip.safetensors is missing"):
        everyone("toy")


def test_no_such_stack():
    with pytest.raises(WrisError, match="no stack 'huge'"):
        everyone("huge")


def test_what_rows_say_of_themselves(fakes, monkeypatch):
    oracle = Contestant("sam box")
    assert (oracle.parts, oracle.supervision) == (("sam",), "the referent's true box")
    row = Contestant("fake wide", "fake", {"wide": True})
    assert (row.parts, row.supervision) == (("clip", "parser"), "none")


def test_whoever_learns_says_from_what():
    learning = {name for name, listed in methods.METHODS.items() if listed.learned}
    assert learning == {name for name, listed in methods.METHODS.items() if listed.supervision != "none"}
    assert learning == {"ppt", "tris", "pcnet"}
