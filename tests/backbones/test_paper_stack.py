"""The paper stack at full size, without the network: random weights, see `tests.random_stack`, and other hashes."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.random_stack import (
    EXPRESSIONS,
    Reference,
    save_albef_as_its_authors_do,
    save_clip_as_openai_does,
    save_sam_as_meta_does,
    unfilled,
)
from wris_lib.backbones.checkpoints import STACKS, checkpoint_path
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.itm import load_matcher
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.loading import load_weights
from wris_lib.backbones.proposals import SETTINGS, sam_proposer
from wris_lib.backbones.sam import SamImage, Segmenter, load_sam
from wris_lib.errors import WrisError
from wris_lib.files import sha256
from wris_lib.methods.clip_sam import ClipSam
from wris_lib.methods.iterprime import IterPrime

# OpenAI's file is a TorchScript archive, and torch advises against making new ones.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).resize((640, 480))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Iterator[Reference]:
    """Both files in a cache of their own, and their hashes in the table."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "paper").mkdir()
    stack = STACKS["paper"]
    clip_file, sam_file = (cache / "paper" / checkpoint.file for checkpoint in (stack.clip, stack.sam))
    made = save_clip_as_openai_does(clip_file)
    save_sam_as_meta_does(sam_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WRIS_CACHE", str(cache))
        here = replace(
            stack,
            clip=replace(stack.clip, sha256=sha256(clip_file)),
            sam=replace(stack.sam, sha256=sha256(sam_file)),
        )
        patch.setitem(STACKS, "paper", here)
        yield made
    clip_file.unlink()
    sam_file.unlink()


@pytest.fixture(scope="module")
def clip(reference: Reference) -> Clip:
    with unfilled():
        return load_clip("paper", device="cpu")


@pytest.fixture(scope="module")
def sam(reference: Reference) -> Segmenter:
    with unfilled():
        return load_sam("paper", device="cpu")


def test_clip_computes_what_open_clip_does(clip: Clip, reference: Reference) -> None:
    # QuickGELU included: with the plain GELU of "ViT-B-16" these would differ.
    torch.testing.assert_close(clip.image_features(reference.images), reference.image_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.text_features(EXPRESSIONS), reference.text_features, atol=1e-5, rtol=0)


def test_plain_gelu_would_have_been_noticed(clip: Clip, reference: Reference) -> None:
    blocks = clip.model.visual.transformer.resblocks
    quick = [block.mlp.gelu for block in blocks]
    try:
        for block in blocks:
            block.mlp.gelu = nn.GELU()
        difference = clip.image_features(reference.images) - reference.image_features
        assert difference.abs().max() > 1e-4
    finally:
        for block, gelu in zip(blocks, quick, strict=True):
            block.mlp.gelu = gelu


def test_sam_has_every_tensor_of_its_file(sam: Segmenter) -> None:
    saved = torch.load(checkpoint_path(STACKS["paper"].sam), weights_only=True, mmap=True)
    loaded = sam.sam.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_method_runs_on_it_from_image_to_mask(clip: Clip, sam: Segmenter, image: Image.Image, monkeypatch) -> None:
    # SAM's twelve blocks are alike: one with windows and one without make a test of seconds.
    monkeypatch.setattr(sam.sam.image_encoder, "blocks", sam.sam.image_encoder.blocks[1:3])
    assert clip.stages == (4, 8, 12)
    for prediction in ClipSam(clip, sam).predict(image, EXPRESSIONS):
        similarity, _, masks = prediction.trace
        assert similarity.response_map.shape == (32, 32)  # CLIP sees 512 pixels in patches of 16
        assert np.isfinite(similarity.response_map).all() and similarity.response_map.std() > 0
        assert masks.masks.shape == (3, 480, 640)
        assert prediction.mask.shape == prediction.response_map.shape == (480, 640)


def test_sams_gradients_reach_the_points(sam: Segmenter) -> None:
    embedded = SamImage(torch.randn(1, 256, 64, 64), original_size=(480, 640), input_size=(768, 1024))
    points = torch.tensor([[[100.0, 50.0]], [[600.0, 400.0]]], requires_grad=True)
    decoded = sam.decode(embedded, points, torch.ones(2, 1, dtype=torch.int64))
    assert decoded.logits.shape == (2, 3, 256, 256)
    decoded.logits.mean().backward()
    assert points.grad.abs().sum() > 0


def test_the_other_models_checkpoint(sam: Segmenter) -> None:
    with pytest.raises(WrisError, match="ViT-B-16.pt was made for another model: Missing key") as failure:
        load_weights(sam.sam, STACKS["paper"].clip)
    assert len(str(failure.value)) < 500


def test_a_damaged_file_is_never_opened(reference: Reference, monkeypatch) -> None:
    path = checkpoint_path(STACKS["paper"].clip)
    with open(path, "r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    monkeypatch.setattr(torch.jit, "load", None)
    try:
        with pytest.raises(WrisError, match="ViT-B-16.pt is damaged or not the file it should be"):
            load_weights(nn.Identity(), STACKS["paper"].clip)
    finally:
        with open(path, "r+b") as file:
            file.seek(1_000_000)
            file.write(byte)


def test_a_hostile_pth_is_not_executed_even_if_its_hash_is_recorded(
    reference: Reference, tmp_path, monkeypatch
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "paper").mkdir()
    path = tmp_path / "paper" / STACKS["paper"].sam.file
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    with pytest.raises(WrisError, match="sam_vit_b_01ec64.pth cannot be read as a checkpoint"):
        load_weights(nn.Identity(), replace(STACKS["paper"].sam, sha256=sha256(path)))
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def albef(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """ALBEF base as its authors save it, in a cache of its own; returns the tensors."""
    stack = STACKS["paper"]
    (tmp_path / "paper").mkdir()
    weights, vocabulary = (tmp_path / "paper" / part.file for part in (stack.itm, stack.itm.vocabulary))
    state = save_albef_as_its_authors_do(weights, vocabulary)
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    words = replace(stack.itm.vocabulary, sha256=sha256(vocabulary))
    itm = replace(stack.itm, sha256=sha256(weights), vocabulary=words)
    monkeypatch.setitem(STACKS, "paper", replace(stack, itm=itm))
    return state


def test_albef_is_read_and_iterprime_runs_on_it(albef: dict[str, Tensor], image: Image.Image) -> None:
    with unfilled():
        matcher = load_matcher("paper", device="cpu")
    assert matcher.grid == (16, 16) and matcher.layer == 8 and matcher.layers == range(6, 12)
    loaded = matcher.model.state_dict()
    assert loaded.keys() == albef.keys() and all(torch.equal(loaded[name], albef[name]) for name in albef)
    assert tuple(loaded["text_encoder.cls.predictions.decoder.weight"].shape) == (30522, 768)

    proposals = np.zeros((2, 480, 640), dtype=bool)
    proposals[0, :, :300], proposals[1, :, 300:] = True, True
    method = IterPrime(matcher, sam_proposer(load_sam("toy"), SETTINGS["toy"]), load_parser("toy"))
    for prediction in method.answer(image, EXPRESSIONS, proposals):
        assert np.isfinite(prediction.response_map).all() and prediction.response_map.std() > 0
        assert any((prediction.mask == mask).all() for mask in proposals) and 0 < prediction.score < 1
