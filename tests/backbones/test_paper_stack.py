"""The paper stack at full size, without the network: random weights in the formats in which their authors publish.

Same sizes, same tensor names, same file formats, same code lines as the real checkpoints; only the numbers are noise,
and therefore the recorded hashes others.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict, convert_weights_to_fp16
from PIL import Image
from segment_anything import sam_model_registry
from torch import Tensor, nn

from wris_lib.backbones.checkpoints import STACKS, checkpoint_path
from wris_lib.backbones.clip import Clip, load_clip
from wris_lib.backbones.itm import load_matcher
from wris_lib.backbones.itm_models import SIZES, Albef
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.loading import load_weights
from wris_lib.backbones.proposals import SETTINGS, Proposer
from wris_lib.backbones.sam import SamImage, Segmenter, load_sam
from wris_lib.errors import WrisError
from wris_lib.files import sha256
from wris_lib.methods.clip_sam import ClipSam
from wris_lib.methods.iterprime import IterPrime
from wris_lib.pretrain.albef import write_vocabulary

# OpenAI's file is a TorchScript archive, and torch advises against making new ones.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")

EXPRESSIONS = ["the man in the green shirt", "a dog left of the car"]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).resize((640, 480))


def noise(shapes: nn.Module) -> dict[str, Tensor]:
    """A state dict for a model on the meta device: pieces of one long row of random numbers."""
    row = torch.randn(30_000_000, generator=torch.Generator().manual_seed(0)) * 0.06
    state = {}
    for start, (name, tensor) in enumerate(shapes.state_dict().items()):
        state[name] = row[start : start + tensor.numel()].view(tensor.shape).clone()
        if tensor.ndim == 1 and name.endswith("weight"):
            state[name] += 1  # of a layer norm
    return state


@dataclass
class Reference:
    """What open_clip itself computes with the saved weights."""

    images: Tensor
    image_features: Tensor
    text_features: Tensor


def save_clip_as_openai_does(path: Path) -> Reference:
    """ViT-B/16 as a TorchScript archive in half precision, with three numbers among the weights."""
    shapes = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
    model = build_model_from_openai_state_dict(noise(shapes))

    # What an independent reader of the file must arrive at.
    images = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 3, 224, 224)).astype(np.float32))
    tokens = open_clip.get_tokenizer("ViT-B-16-quickgelu")(
        [prompt.format(expression) for expression in EXPRESSIONS for prompt in STACKS["paper"].clip.prompts]
    )
    model.float()
    with torch.no_grad():
        texts = model.encode_text(tokens, normalize=True).unflatten(0, (len(EXPRESSIONS), -1)).mean(dim=1)
        reference = Reference(
            images, model.encode_image(images, normalize=True), nn.functional.normalize(texts, dim=-1)
        )

    convert_weights_to_fp16(model)
    model.attn_mask = None  # OpenAI's has none among its buffers
    for name, value in {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}.items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    with torch.no_grad():
        torch.jit.trace(model, (images.half(), tokens[:1]), check_trace=False).save(path)
    return reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Iterator[Reference]:
    """Both files in a cache of their own, and their hashes in the table."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "paper").mkdir()
    stack = STACKS["paper"]
    clip_file, sam_file = (cache / "paper" / checkpoint.file for checkpoint in (stack.clip, stack.sam))
    made = save_clip_as_openai_does(clip_file)
    with torch.device("meta"):
        shapes = sam_model_registry["vit_b"]()
    torch.save(noise(shapes), sam_file)
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
    return load_clip("paper", device="cpu")


@pytest.fixture(scope="module")
def sam(reference: Reference) -> Segmenter:
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = dict(Albef(SIZES["base"]).state_dict())
    embeddings = "text_encoder.bert.embeddings"
    more = {f"{embeddings}.token_type_embeddings.weight": torch.randn(2, 768), "image_queue": torch.randn(256, 10)}
    more |= {name.replace("_proj", "_proj_m"): tensor for name, tensor in state.items() if "_proj." in name[:12]}
    torch.save({"model": {**state, **more}, "epoch": 29}, weights)
    write_vocabulary(["man", "green", "shirt", "dog", "left", "car"], vocabulary)
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path))
    words = replace(stack.itm.vocabulary, sha256=sha256(vocabulary))
    itm = replace(stack.itm, sha256=sha256(weights), vocabulary=words)
    monkeypatch.setitem(STACKS, "paper", replace(stack, itm=itm))
    state[f"{embeddings}.position_embeddings.weight"] += more[f"{embeddings}.token_type_embeddings.weight"][0]
    return state


def test_albef_is_read_and_iterprime_runs_on_it(albef: dict[str, Tensor], image: Image.Image) -> None:
    matcher = load_matcher("paper", device="cpu")
    assert matcher.grid == (16, 16) and matcher.layer == 8 and matcher.layers == range(6, 12)
    loaded = matcher.model.state_dict()
    assert loaded.keys() == albef.keys() and all(torch.equal(loaded[name], albef[name]) for name in albef)
    assert tuple(loaded["text_encoder.cls.predictions.decoder.weight"].shape) == (30522, 768)

    proposals = np.zeros((2, 480, 640), dtype=bool)
    proposals[0, :, :300], proposals[1, :, 300:] = True, True
    method = IterPrime(matcher, Proposer(load_sam("toy"), SETTINGS["toy"]), load_parser("toy"))
    for prediction in method.answer(image, EXPRESSIONS, proposals):
        assert np.isfinite(prediction.response_map).all() and prediction.response_map.std() > 0
        assert any((prediction.mask == mask).all() for mask in proposals) and 0 < prediction.score < 1
