"""Which weights each stack is made of, where they lie, and how they come here.

A *stack* is a row of this table and nothing more: every other line of the library is the same for the
embedded toy models and for the papers' models. A file is used only after its SHA-256 has been compared with
the recorded one. Where an author has published none, it is recorded when the file is fetched, from a file that
has the MD5 its server announces. This module needs no torch, so that the doctor can read it where torch is broken.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from wris_lib.download import FETCH, Remote, fetch_file
from wris_lib.errors import WrisError
from wris_lib.files import atomic_write, cache_dir, sha256

WEIGHTS = Path(__file__).parent.parent / "weights"
REINSTALL = "install the library again, or train it with `python -m wris_lib pretrain`"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Remote):
    """One file of weights: packaged with the library, or, when it has `urls`, fetched into the cache.

    Where its `sha256` is None, `SHA256SUMS` beside the file has it, written when it is trained or fetched.
    """


@dataclass(frozen=True, kw_only=True)
class ClipCheckpoint(Checkpoint):
    """Weights of an open_clip model."""

    model_name: str  # of open_clip's `create_model`
    dense_size: int  # pixels: input side at which similarity maps are computed
    prompts: tuple[str, ...] = ("{}",)  # an expression's embedding is the mean over these
    surgery_from: int | None = None  # block, from 1, at which CLIP Surgery begins; None: the first of the last half


@dataclass(frozen=True, kw_only=True)
class SamCheckpoint(Checkpoint):
    """Weights of a segment_anything model."""

    model_type: str  # key of segment_anything's `sam_model_registry`


@dataclass(frozen=True, kw_only=True)
class ItmCheckpoint(Checkpoint):
    """Weights of an image-text matching model."""

    size: str  # key of `itm_models.SIZES`
    layer: int  # text layer, from 0, whose cross-attention is read
    vocabulary: Checkpoint  # WordPiece, one token a line


@dataclass(frozen=True)
class Stack:
    """The models that a method is built from."""

    name: str
    clip: ClipCheckpoint
    sam: SamCheckpoint
    parser: Checkpoint | str  # a str names a spaCy pipeline, which comes as a package: see `spacy_download`
    llm: Checkpoint | str  # a str names a model on the Hugging Face hub: see `llm.local_llm`
    itm: ItmCheckpoint
    mask2former: str | None = None  # a model on the Hugging Face hub: see `mask2former.load_mask2former`
    # Trained by this library; nobody has published any for the papers' models: see `get_stack`.
    ppt: Checkpoint | None = None  # PPT's point generator
    tris: Checkpoint | None = None  # what L_cls alone learns
    pcnet: Checkpoint | None = None  # PCNet's referring module
    note: str = ""  # what else a reader of its figures must know

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The stack's files: weights, and the vocabulary of one of them."""
        parts = (self.clip, self.sam, self.parser, self.llm, self.itm, self.ppt, self.tris, self.pcnet)
        return tuple(part for part in (*parts, self.itm.vocabulary) if isinstance(part, Checkpoint))


STACKS = {
    stack.name: stack
    for stack in (
        Stack(
            "toy",
            # Six blocks are too few to spend three before Surgery begins: measured on ToyRef train.
            clip=ClipCheckpoint(model_name="wris-toy", file="clip.safetensors", dense_size=256, surgery_from=2),
            sam=SamCheckpoint(model_type="wris_toy", file="sam.safetensors"),
            parser=Checkpoint(file="parser.msgpack"),
            llm=Checkpoint(file="t5.safetensors"),
            itm=ItmCheckpoint(
                size="toy",
                file="albef.safetensors",
                layer=2,
                vocabulary=Checkpoint(file="albef_vocab.txt"),
            ),
            ppt=Checkpoint(file="ppt.safetensors"),
            tris=Checkpoint(file="tris.safetensors"),
            pcnet=Checkpoint(file="pcnet.safetensors"),
        ),
        Stack(
            "paper",
            # OpenAI trained with QuickGELU: plain "ViT-B-16" would load silently and compute something else.
            clip=ClipCheckpoint(
                model_name="ViT-B-16-quickgelu",
                file="ViT-B-16.pt",
                sha256="5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                urls=(
                    "https://openaipublic.azureedge.net/clip/models/"
                    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
                    "https://huggingface.co/jinaai/clip-models/resolve/main/ViT-B-16.pt",
                ),
                megabytes=351,
                licence="MIT",
                dense_size=512,
                # CLIP Surgery averages over 85 templates. Three of them cost a thirtieth.
                prompts=("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene."),
            ),
            sam=SamCheckpoint(
                model_type="vit_b",
                file="sam_vit_b_01ec64.pth",  # 01ec64 begins the file's MD5, not its SHA-256
                sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
                urls=(
                    "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
                    "https://huggingface.co/ybelkada/segment-anything/resolve/main/checkpoints/sam_vit_b_01ec64.pth",
                ),
                megabytes=375,
                licence="Apache-2.0",
            ),
            # Trained on 14 million pairs. Its authors have published no hash, and one source.
            itm=ItmCheckpoint(
                size="base",
                file="ALBEF.pth",
                urls=("https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/ALBEF.pth",),
                megabytes=3490,
                licence="BSD-3-Clause",
                layer=8,
                vocabulary=Checkpoint(
                    file="bert-base-uncased-vocab.txt",
                    sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                    urls=(
                        "https://huggingface.co/bert-base-uncased/resolve/main/vocab.txt",
                        "https://s3.amazonaws.com/models.huggingface.co/bert/bert-base-uncased-vocab.txt",
                    ),
                    megabytes=1,
                    licence="Apache-2.0",
                ),
            ),
            parser="en_core_web_sm",
            llm="google/flan-t5-base",
            mask2former="facebook/mask2former-swin-large-coco-panoptic",
        ),
    )
}


def default_stack() -> str:
    """Name of the stack to use when none is given: `$WRIS_STACK`, or "toy"."""
    return os.environ.get("WRIS_STACK") or "toy"


def get_stack(name: str | None = None) -> Stack:
    """The stack of that name; without a name the default one.

    What nobody has published for it, and `train` has made on this machine, is a part of it.

    Raises:
        WrisError: no such stack.
    """
    name = name or default_stack()
    if name not in STACKS:
        raise WrisError(f"there is no stack {name!r}; choose one of: {', '.join(STACKS)}.")
    stack = STACKS[name]
    lacking = [part for part in ("ppt", "tris", "pcnet") if getattr(stack, part) is None]
    own = {part: path for part in lacking if (path := trained_folder(part, name) / f"{part}.safetensors").is_file()}
    return replace(stack, **{part: Checkpoint(file=str(path)) for part, path in own.items()})


def trained_folder(method: str, stack: str) -> Path:
    """Where `train METHOD --stack STACK` keeps its checkpoints, and in the end its weights, unless told otherwise."""
    return cache_dir() / "train" / f"{method}-{stack}"


def spacy_download(package: str) -> str:
    """The command that installs a spaCy pipeline, in the version that fits the installed spaCy."""
    return f"python -m spacy download {package}"


def hub_download(name: str) -> str:
    """The command that brings a model of the Hugging Face hub to this machine."""
    return f"huggingface-cli download {name}"


def is_downloaded(name: str) -> bool:
    """Whether `hub_download` has brought a model, which may also be a folder."""
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def checkpoint_path(checkpoint: Checkpoint) -> Path:
    """Where the file lies: in the package, or in the cache when it had to be fetched.

    Raises:
        WrisError: it is not there.
    """
    path = place_of(checkpoint)
    if not path.is_file():
        mend = f"fetch it with `{FETCH}`" if checkpoint.urls else REINSTALL
        raise WrisError(f"{path} is missing; {mend}.")
    return path


def verify(path: Path, expected: str) -> None:
    """Compare a file's SHA-256 with the recorded one.

    Raises:
        WrisError: they differ, so the file is damaged or another one.
    """
    if (found := sha256(path)) != expected:
        raise WrisError(
            f"{path} is damaged or not the file it should be: its SHA-256 begins with {found[:12]} instead of"
            f" {expected[:12]}; delete it and fetch or install it again."
        )


def expected_sha256(checkpoint: Checkpoint) -> str:
    """The recorded hash: from the table, or from the `SHA256SUMS` beside the file.

    Raises:
        WrisError: none is recorded.
    """
    if expected := _known_sha256(checkpoint):
        return expected
    if checkpoint.urls:
        raise WrisError(
            f"{place_of(checkpoint)} has not been compared with its source yet; run `{FETCH}`, which does that without"
            " fetching it again and records its hash."
        )
    raise WrisError(f"{WEIGHTS / 'SHA256SUMS'} has no line for {checkpoint.file}; {REINSTALL}.")


def record_sha256(path: Path) -> None:
    """Record the SHA-256 of a file in `SHA256SUMS` beside it (the format of `sha256sum`)."""
    sums = _recorded(path.parent) | {path.name: sha256(path)}
    with atomic_write(path.parent / "SHA256SUMS", "w") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def paper_status() -> dict[str, str]:
    """For each file of the paper stack: "ready", "missing", "damaged", "begun" (a fetch broke off) or "unchecked".

    The last is a file put there by hand that has no published hash: fetching it compares it with its source.
    """
    return {checkpoint.file: _status(checkpoint) for checkpoint in STACKS["paper"].checkpoints}


def fetch_checkpoint(checkpoint: Checkpoint) -> None:
    """Bring a file of the paper stack into the cache, and record its hash if nobody has published one.

    Raises:
        WrisError: no source worked; the cache is read-only or full. What has arrived is kept.
    """
    expected = _known_sha256(checkpoint)
    fetch_file(checkpoint, place_of(checkpoint), expected, FETCH)
    if not expected:
        record_sha256(place_of(checkpoint))


def place_of(checkpoint: Checkpoint) -> Path:
    """Where the file lies, or will: in the package, or in the cache when it has to be fetched."""
    return cache_dir() / "paper" / checkpoint.file if checkpoint.urls else WEIGHTS / checkpoint.file


def _recorded(folder: Path) -> dict[str, str]:
    """File name to SHA-256, as the folder's `SHA256SUMS` has them."""
    sums = folder / "SHA256SUMS"
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    return {name: digest for digest, name in (line.split() for line in lines)}


def _known_sha256(checkpoint: Checkpoint) -> str | None:
    path = place_of(checkpoint)
    return checkpoint.sha256 or _recorded(path.parent).get(path.name)


def _status(checkpoint: Checkpoint) -> str:
    path = place_of(checkpoint)
    if path.is_file():
        expected = _known_sha256(checkpoint)
        if not expected:
            return "unchecked"
        return "ready" if sha256(path) == expected else "damaged"
    return "begun" if path.with_name(f"{path.name}.partial").exists() else "missing"
