"""The paper stack with random weights of full size, in the formats in which their authors publish.

Same sizes, same tensor names, same file formats, same code lines as the real checkpoints; only the numbers are noise.
As a command it shows that a machine can run the notebooks on the paper stack, without the network and before anybody
has downloaded four gigabytes:

    python -m tests.random_stack FOLDER
    source FOLDER/environment
    WRIS_DATA=… WRIS_DATASET=… pytest --nbmake notebooks

What it makes in FOLDER: a cache with the checkpoints, a spaCy package, a T5, a Mask2Former; and a `sitecustomize.py`
that puts their hashes into the table of checkpoints, in whichever Python has the folder on its path.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import build_model_from_openai_state_dict, convert_weights_to_fp16
from segment_anything import sam_model_registry
from torch import Tensor, nn

from wris_lib.backbones.checkpoints import STACKS, record_sha256
from wris_lib.backbones.itm_models import SIZES, Albef
from wris_lib.files import sha256
from wris_lib.pretrain.albef import write_vocabulary

EXPRESSIONS = ["the man in the green shirt", "a dog left of the car"]
NOTE = "random weights: its figures mean nothing"


@contextmanager
def unfilled() -> Iterator[None]:
    """Models are made without their first random weights, which take seconds and are overwritten at once."""
    filling = {name: getattr(Tensor, name) for name in ("normal_", "uniform_")}
    for name in filling:
        setattr(Tensor, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, method in filling.items():
            setattr(Tensor, name, method)


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
    with unfilled():
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
    with torch.no_grad():  # of the archive's code, which nobody runs, the shorter half will do
        torch.jit.trace_module(model, {"encode_text": tokens[:1]}, check_trace=False).save(path)
    return reference


def save_sam_as_meta_does(path: Path) -> None:
    """ViT-B's state dict."""
    with torch.device("meta"):
        shapes = sam_model_registry["vit_b"]()
    torch.save(noise(shapes), path)


def save_albef_as_its_authors_do(path: Path, vocabulary: Path) -> dict[str, Tensor]:
    """ALBEF base with what only training needs, and a vocabulary; returns the tensors that are to be read."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = dict(Albef(SIZES["base"]).state_dict())
    embeddings = "text_encoder.bert.embeddings"
    more = {f"{embeddings}.token_type_embeddings.weight": torch.randn(2, 768), "image_queue": torch.randn(256, 10)}
    more |= {name.replace("_proj", "_proj_m"): tensor for name, tensor in state.items() if "_proj." in name[:12]}
    torch.save({"model": {**state, **more}, "epoch": 29}, path)
    write_vocabulary(["man", "green", "shirt", "dog", "left", "car"], vocabulary)
    state[f"{embeddings}.position_embeddings.weight"] += more[f"{embeddings}.token_type_embeddings.weight"][0]
    return state


def save_parser_as_spacy_does(folder: Path) -> None:
    """The toy pipeline as an installed package of the name that the paper stack's has."""
    from wris_lib.backbones.language import load_parser

    name = STACKS["paper"].parser
    package = folder / name
    package.mkdir()
    load_parser("toy").nlp.to_disk(package / "en_pipeline-0.0.0")  # what spaCy calls a pipeline without a name
    (package / "meta.json").write_bytes((package / "en_pipeline-0.0.0" / "meta.json").read_bytes())
    (package / "__init__.py").write_text(
        "from spacy.util import load_model_from_init_py\n"
        "def load(**options):\n"
        "    return load_model_from_init_py(__file__, **options)\n"
    )
    installed = folder / f"{name}-0.0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.0\n")


def save_t5_as_transformers_do(folder: Path) -> None:
    """A T5 of FLAN-T5 base's size, with the toy T5's tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    from wris_lib.backbones.llm import load_llm

    tokenizer = load_llm("toy").tokenizer
    config = T5Config(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=2048,
        num_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def save_mask2former_as_transformers_do(folder: Path) -> None:
    """Mask2Former with Swin-L and 200 queries, for COCO's 133 panoptic classes."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(
        image_size=384,
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(backbone_config=swin, num_queries=200, num_labels=133)
        )
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}, size_divisor=32).save_pretrained(folder)


def save_trained_parts(stack: str) -> None:
    """PPT's generator, TRIS and PCNet for a stack whose models are there, as `train` would leave them: untrained."""
    from wris_lib.backbones.checkpoints import trained_folder
    from wris_lib.backbones.clip import load_clip
    from wris_lib.backbones.trained import save_trained
    from wris_lib.methods.pcnet.crm import Crm
    from wris_lib.methods.pcnet.run import STAGES
    from wris_lib.methods.pcnet.run import configure as configure_crm
    from wris_lib.methods.ppt.config import configure
    from wris_lib.methods.ppt.model import PointGenerator
    from wris_lib.methods.ppt.weights import save_generator

    clip = load_clip(stack, device="cpu")
    torch.manual_seed(0)
    for method in ("ppt", "tris", "pcnet"):
        path = trained_folder(method, stack) / f"{method}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if method == "ppt":
            save_generator(PointGenerator(configure(clip)), clip, path)
        else:
            save_trained(Crm(configure_crm(clip, stages=STAGES[method])), method, clip, path)
        record_sha256(path)


# Run by every Python that has the folder on its path; {hashes} are those of the files that this module has made.
CUSTOMIZE = """from dataclasses import replace

from wris_lib.backbones.checkpoints import STACKS

hashes = {hashes}
paper = STACKS["paper"]
words = replace(paper.itm.vocabulary, sha256=hashes[paper.itm.vocabulary.file])
STACKS["paper"] = replace(
    paper,
    clip=replace(paper.clip, sha256=hashes[paper.clip.file]),
    sam=replace(paper.sam, sha256=hashes[paper.sam.file]),
    itm=replace(paper.itm, sha256=hashes[paper.itm.file], vocabulary=words),
    llm={llm!r},
    mask2former={mask2former!r},
    note={note!r},
)
"""


def make(folder: Path) -> None:
    """Make everything in a new folder."""
    import os

    folder = folder.resolve()
    cache, site, paper = folder / "cache", folder / "site", STACKS["paper"]
    for place in (cache / "paper", site):
        place.mkdir(parents=True)
    clip_file, sam_file, itm_file, words = (
        cache / "paper" / part.file for part in (paper.clip, paper.sam, paper.itm, paper.itm.vocabulary)
    )
    save_clip_as_openai_does(clip_file)
    save_sam_as_meta_does(sam_file)
    save_albef_as_its_authors_do(itm_file, words)
    save_parser_as_spacy_does(site)
    save_t5_as_transformers_do(folder / "t5")
    save_mask2former_as_transformers_do(folder / "mask2former")
    hashes = {path.name: sha256(path) for path in (clip_file, sam_file, itm_file, words)}
    models = {"llm": str(folder / "t5"), "mask2former": str(folder / "mask2former")}
    (site / "sitecustomize.py").write_text(CUSTOMIZE.format(hashes=json.dumps(hashes), note=NOTE, **models))
    STACKS["paper"] = replace(paper, clip=replace(paper.clip, sha256=hashes[clip_file.name]))
    os.environ["WRIS_CACHE"] = str(cache)
    save_trained_parts("paper")
    (folder / "environment").write_text(
        f"export WRIS_STACK=paper WRIS_CACHE={cache} PYTHONPATH={site}${{PYTHONPATH:+:$PYTHONPATH}}\n"
    )
    print(f"source {folder / 'environment'}")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
