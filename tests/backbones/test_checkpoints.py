"""The stack table, recorded hashes, and damaged checkpoints."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wris_lib import files
from wris_lib.backbones import checkpoints
from wris_lib.backbones.checkpoints import (
    STACKS,
    Checkpoint,
    checkpoint_path,
    expected_sha256,
    get_stack,
    record_sha256,
    trained_folder,
    verify,
)
from wris_lib.backbones.loading import load_state, load_weights
from wris_lib.errors import WrisError

# OpenAI's file is a TorchScript archive, and torch advises against making new ones.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")


# --- the table ------------------------------------------------------------------------------------


def test_stacks_are_chosen_by_name_then_by_environment(monkeypatch) -> None:
    monkeypatch.delenv("WRIS_STACK", raising=False)
    assert get_stack().name == "toy"
    monkeypatch.setenv("WRIS_STACK", "paper")
    assert get_stack().name == "paper"
    assert get_stack("toy").name == "toy"
    monkeypatch.setenv("WRIS_STACK", "papr")
    with pytest.raises(WrisError, match=r"there is no stack 'papr'; choose one of: toy, paper\."):
        get_stack()


def test_what_has_not_been_fetched_is_said_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    with pytest.raises(WrisError, match=r"ViT-B-16\.pt is missing; fetch it with `python -m wris_lib fetch paper`"):
        checkpoints.checkpoint_path(STACKS["paper"].clip)


def test_files_of_a_stack_are_all_its_parts_but_packages() -> None:
    toy, paper = STACKS["toy"], STACKS["paper"]
    learnt_here = (toy.ppt, toy.tris, toy.pcnet)
    assert toy.checkpoints == (toy.clip, toy.sam, toy.parser, toy.llm, toy.itm, *learnt_here, toy.itm.vocabulary)
    assert paper.checkpoints == (paper.clip, paper.sam, paper.itm, paper.itm.vocabulary)
    assert paper.parser == "en_core_web_sm"


def test_every_downloaded_file_has_a_size_a_licence_and_all_but_albef_a_hash_and_two_sources() -> None:
    for checkpoint in STACKS["paper"].checkpoints:
        assert checkpoint.megabytes and checkpoint.licence
        assert all(url.startswith("https://") for url in checkpoint.urls)
        if checkpoint.file == "ALBEF.pth":
            assert checkpoint.sha256 is None and len(checkpoint.urls) == 1
        else:
            assert re.fullmatch("[0-9a-f]{64}", checkpoint.sha256) and len(checkpoint.urls) >= 2


def test_openai_names_the_hash_in_its_address_as_open_clip_does() -> None:
    from open_clip import pretrained

    clip = STACKS["paper"].clip
    assert pretrained.get_pretrained_url(clip.model_name, "openai") == clip.urls[0]
    assert clip.sha256 in clip.urls[0]


# --- toy weights and their recorded hashes --------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch) -> Path:
    """A folder in place of the packaged weights."""
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    return tmp_path


TOY = Checkpoint(file="toy.safetensors")


def save_toy(folder: Path, model: nn.Module, record: bool = True) -> None:
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / TOY.file)
    if record:
        checkpoints.record_sha256(folder / TOY.file)


def test_toy_weights_are_recorded_and_loaded(weights: Path) -> None:
    (weights / "other.bin").write_bytes(b"other")
    checkpoints.record_sha256(weights / "other.bin")
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    save_toy(weights, saved)
    load_weights(loaded, TOY)
    torch.testing.assert_close(loaded.weight, saved.weight.half().float())

    lines = (weights / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{files.sha256(weights / name)}  {name}" for name in ("other.bin", "toy.safetensors")]


def test_retrained_weights_replace_their_line(weights: Path) -> None:
    save_toy(weights, nn.Linear(3, 2))
    save_toy(weights, nn.Linear(3, 2))
    assert len((weights / "SHA256SUMS").read_text().splitlines()) == 1
    load_weights(nn.Linear(3, 2), TOY)


def test_toy_weights_that_are_missing_unrecorded_or_damaged(weights: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(WrisError, match="toy.safetensors is missing; install the library again"):
        load_weights(model, TOY)
    save_toy(weights, model, record=False)
    with pytest.raises(WrisError, match="SHA256SUMS has no line for toy.safetensors"):
        load_weights(model, TOY)
    checkpoints.record_sha256(weights / TOY.file)
    content = bytearray((weights / TOY.file).read_bytes())
    content[-1] ^= 1
    (weights / TOY.file).write_bytes(content)
    with pytest.raises(WrisError, match="is damaged or not the file it should be: its SHA-256 begins with"):
        load_weights(model, TOY)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(4, 2), r"size mismatch for weight: .*\[2, 4\].*\[2, 3\]"),
        (nn.Linear(3, 2, bias=False), 'Missing key.*"bias"'),
        (nn.Bilinear(3, 3, 2), "size mismatch for weight"),
    ],
)
def test_a_checkpoint_of_another_model(weights: Path, other: nn.Module, words: str) -> None:
    save_toy(weights, other)
    with pytest.raises(WrisError, match=f"toy.safetensors was made for another model: {words}") as failure:
        load_weights(nn.Linear(3, 2), TOY)
    assert "\n" not in str(failure.value)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if name != "queue"}


def test_a_state_is_converted_before_it_is_loaded(weights: Path) -> None:
    saved, loaded = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {f"module.{name}": tensor for name, tensor in saved.state_dict().items()}
    save_file(state | {"queue": torch.zeros(5)}, weights / TOY.file)
    checkpoints.record_sha256(weights / TOY.file)
    with pytest.raises(WrisError, match="made for another model: Missing key"):
        load_weights(loaded, TOY)
    load_weights(loaded, TOY, renamed)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict())
    with pytest.raises(WrisError, match="made for another model: size mismatch for weight"):
        load_weights(nn.Linear(4, 2), TOY, renamed)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_saved_together_with_its_training(tmp_path: Path, zipped: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-4], "warmup_t": 20},
        "config": {"image_res": 256, "train_file": ["a.json", "b.json"], "distill": True},
        "epoch": 29,
    }
    torch.save(saved, tmp_path / "all.pth", _use_new_zipfile_serialization=zipped)
    state = load_state(tmp_path / "all.pth")
    assert list(state) == ["weight", "bias"]
    torch.testing.assert_close(state, dict(model.state_dict()), check_device=False)


def test_a_tensor_may_be_called_model(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2), "bias": torch.zeros(1)}, tmp_path / "weights.pth")
    assert list(load_state(tmp_path / "weights.pth")) == ["model", "bias"]


# --- files that are not checkpoints ---------------------------------------------------------------


class Hostile:
    """Unpickling this creates a file: what a downloaded checkpoint must never be able to do."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


def test_a_hostile_pickle_is_refused_and_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"weight": Hostile(trace)}, tmp_path / "new.pth")
    torch.save({"weight": Hostile(trace)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(trace), protocol=2))
    beside = {"model": {"weight": torch.zeros(1)}, "config": Hostile(trace)}
    torch.save(beside, tmp_path / "beside.pth")
    for name in ("new.pth", "old.pth", "plain.pth", "beside.pth"):
        with pytest.raises(WrisError, match=f"{name} cannot be read as a checkpoint"):
            load_state(tmp_path / name)
    assert not trace.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes()).close()
    assert trace.exists()  # it would have been


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


def torn(content: bytes) -> bytes:
    return content[:100] + content[200:]


def replaced(content: bytes) -> bytes:
    return b"<html>Not found</html>"


def emptied(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, zeroed, torn, replaced, emptied])
@pytest.mark.parametrize("suffix", [".pth", ".old.pth", ".pt", ".safetensors"])
def test_unreadable_files(tmp_path: Path, suffix: str, damage) -> None:
    path = tmp_path / f"weights{suffix}"
    model = nn.Linear(64, 64)
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    elif suffix == ".pt":
        torch.jit.script(model).save(path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pth")
    load_state(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WrisError, match=re.escape(f"{path} cannot be read as a checkpoint: it is damaged")):
        load_state(path)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    for content in ([1, 2], {"epoch": 3}, {"state_dict": {"weight": torch.zeros(1)}}, {"model": {"epoch": 3}}):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(WrisError, match="is not a checkpoint: expected a dictionary of tensors"):
            load_state(tmp_path / "weights.pth")


def test_a_torchscript_archive_without_openais_numbers(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("context_length", torch.tensor(77))
    torch.jit.script(model).save(tmp_path / "weights.pt")
    state = load_state(tmp_path / "weights.pt")
    assert set(state) == {"weight", "bias"}


def test_what_was_trained_here_is_a_part_of_the_stack(tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    assert get_stack("paper").pcnet is None
    path = trained_folder("pcnet", "paper") / "pcnet.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    record_sha256(path)
    own = get_stack("paper").pcnet
    assert checkpoint_path(own) == path and get_stack("paper").ppt is None
    verify(path, expected_sha256(own))
    trained_folder("pcnet", "toy").mkdir()
    (trained_folder("pcnet", "toy") / "pcnet.safetensors").write_bytes(b"a trial")
    assert get_stack("toy") == STACKS["toy"]  # has weights, which a trial does not replace
