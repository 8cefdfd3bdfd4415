"""IteRPrimE's studies: the paper's Tables 2 to 5 and Figure 6 on toy data, and what batching and caching save."""

import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from wris_lib import data, evaluate
from wris_lib.backbones.itm import Matcher, albef_matcher, load_matcher
from wris_lib.backbones.itm_models import SIZES, Albef
from wris_lib.backbones.language import load_parser
from wris_lib.backbones.proposals import SETTINGS, sam_proposer
from wris_lib.backbones.sam import load_sam
from wris_lib.benchmark import Contestant, records_of
from wris_lib.data.images import load_image
from wris_lib.data.toyworld import wording
from wris_lib.data.toyworld.scenes import UNSEEN
from wris_lib.evaluate import Record
from wris_lib.methods.iterprime import IterPrime
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS, aggregate
from wris_lib.methods.iterprime.igrs import Refined, refine
from wris_lib.methods.iterprime.words import PREFIX, find_pieces
from wris_lib.pretrain.albef import write_vocabulary
from wris_lib.report import RESULTS
from wris_lib.studies.common import LIMIT, write

PEOPLE, LONG, VAL, CUT = "toyref:testA", "toyrefg:test", "toyref:val", "toycut:val"
Options = dict[str, Hashable]
# Table -> splits, and the options behind each row. What a row does not name is as in `IterPrime.load`.
TABLES: dict[str, tuple[tuple[str, ...], dict[str, Options]]] = {
    "aggregation (Table 3)": ((PEOPLE, LONG), {how: {"aggregation": how} for how in AGGREGATIONS}),
    "hidden (Table 4)": ((PEOPLE, LONG), {where: {"hide": where} for where in ("image", "attention")}),
    "refinement (Table 5)": (
        (LONG, VAL),
        {
            "GVLP": {"aggregation": "gvlp", "passes": 0},
            "GVLP + IGRS": {"aggregation": "gvlp"},
            "PWEM": {"passes": 0},
            "PWEM + IGRS": {},
        },
    ),
    "passes (Figure 6)": ((VAL,), {f"ν = {passes}": {"passes": passes} for passes in range(6)}),
    "decay (Figure 6)": ((VAL,), {f"λ = {decay:.1f}": {"decay": decay} for decay in np.arange(0, 1, 0.1).round(1)}),
    "deviations": (
        (LONG, VAL),
        {
            "as here": {},
            "σ in the average": {"sharpen": True},
            "released stop": {"released_stop": True},
            "both": {"sharpen": True, "released_stop": True},
        },
    ),
}
SPEED_IMAGES = {"toy": 12, "albef_base": 1}
EXPRESSIONS = 7  # an image, as RefCOCO has on average


def ablation(folder: Path = RESULTS) -> None:
    """All of `TABLES`, ToyCut, and what refinement heals and breaks. Writes `iterprime_ablation.json`.

    Args:
        folder: where the result goes.
    """
    rows = [
        _row(table, name, split, ask(options, split))
        for table, (splits, settings) in TABLES.items()
        for split in splits
        for name, options in settings.items()
    ]
    cut, items = ask({}, CUT), data.load(CUT).items
    unseen = [record for record in cut if items[record["item"]].category in UNSEEN]
    rows += [_row("ToyCut (Table 2)", name, CUT, some) for name, some in (("all", cut), ("unseen", unseen))]
    rules: dict[str, Options] = {"as here": {}, "released stop": {"released_stop": True}}
    healing = {
        split: {rule: heal(ask({"passes": 0}, split), ask(options, split)) for rule, options in rules.items()}
        for split in (LONG, VAL)
    }
    write(folder / "iterprime_ablation.json", "study iterprime ablation", [0], rows, healing=healing)


def ask(options: Options, split: str) -> list[Record]:
    """Records of IteRPrimE with these options, from the cache where they are there."""
    usual = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    name = " ".join(["iterprime", *(f"{key}={value}" for key, value in sorted(usual.items()))])
    return records_of(Contestant(name, "iterprime", usual), split, data.load(split).items, LIMIT, 0, "toy")


def _row(table: str, name: str, split: str, records: Sequence[Record]) -> dict[str, Any]:
    kinds = {kind: part for kind, part in evaluate.breakdown(records).items() if kind in ("Position", "Others")}
    figures = {"metrics": evaluate.summarize(records), "kinds": kinds}
    return {"table": table, "name": name, "data": split, "n": len(records)} | figures


def heal(before: Sequence[Record], after: Sequence[Record]) -> dict[str, int]:
    """How many expressions were wrong (IoU below 0.5) before refinement and right after, the opposite, and all."""
    right = np.array([[record["iou"] >= 0.5 for record in records] for records in (before, after)])
    return {"healed": int((~right[0] & right[1]).sum()), "broken": int((right[0] & ~right[1]).sum()), "n": len(before)}


def speed(folder: Path = RESULTS) -> None:
    """The straightforward way and ours, on the same model, inputs and device. Writes `iterprime_speed.json`.

    Args:
        folder: where the result goes.
    """
    rows = []
    for name, images in SPEED_IMAGES.items():
        matcher = load_matcher("toy") if name == "toy" else random_albef("base")
        rows.append({"name": name, "device": str(matcher.device)} | compare(matcher, images))
        print(rows[-1])
    threads = torch.get_num_threads()
    write(folder / "iterprime_speed.json", "study iterprime speed", [0], rows, threads=threads)


def random_albef(size: str) -> Matcher:
    """A matcher with random weights, of one of `SIZES`, with the words of the toy world."""
    with TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        vocabulary = Path(folder) / "vocabulary.txt"
        write_vocabulary(wording.vocabulary(), vocabulary)
        return albef_matcher(Albef(SIZES[size]), vocabulary, layer=8)


def compare(matcher: Matcher, images: int) -> dict[str, Any]:
    """Seconds of both ways over the same images with `EXPRESSIONS` each, and how far their maps are apart.

    Args:
        matcher: of either size.
        images: how many of ToyRef val, from its beginning, have enough expressions.
    """
    method = IterPrime(matcher, sam_proposer(load_sam("toy"), SETTINGS["toy"]), load_parser("toy"))
    asked: dict[Path, list[str]] = {}
    for item in data.load(VAL).items:
        asked.setdefault(item.image_path, []).append(item.expression)
    work = [(load_image(path), texts[:EXPRESSIONS]) for path, texts in asked.items() if len(texts) >= EXPRESSIONS]
    work = work[:images]
    method.look(*work[0]), straightforward(method, *work[0])  # what only the first call needs is not counted
    cuda = matcher.device.type == "cuda"

    def timed(way: Callable[[Image.Image, list[str]], list[Refined]]) -> tuple[list[Refined], dict[str, float]]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = [refined for image, texts in work for refined in way(image, texts)]
        seconds = time.perf_counter() - start  # maps' numbers were read on the way, so nothing is still under way
        figures = {"expressions_per_second": round(len(found) / seconds, 3)}
        return found, figures | ({"memory_mb": round(torch.cuda.max_memory_allocated() / 1e6)} if cuda else {})

    slow, theirs = timed(lambda image, texts: straightforward(method, image, texts))
    fast, ours = timed(method.look)
    difference = max(
        float((a.response_map - b.response_map).abs().max())
        for one, other in zip(slow, fast, strict=True)
        for a, b in zip(one.passes, other.passes, strict=True)
    )
    return {
        "speedup": round(ours["expressions_per_second"] / theirs["expressions_per_second"], 1),
        "max_abs_diff": difference,
        "expressions": len(slow),
        "passes": sum(len(refined.passes) for refined in slow),
        "straightforward": theirs,
        "ours": ours,
    }


def straightforward(method: IterPrime, image: Image.Image, expressions: list[str]) -> list[Refined]:
    """`IterPrime.look` with an ALBEF as one would first write it: one expression at a time, and in each pass the whole
    model forward and backward, with LAVIS's own forward pass and its hooks on the attention."""
    matcher, model = method.matcher, method.matcher.model
    pixels = matcher.preprocess(image)[None]
    cross = model.text_layers[matcher.layer].crossattention.self
    found = []
    for parse in method.parser.parse(expressions):
        text = PREFIX + parse.expression
        spans = matcher.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        pieces = find_pieces(parse, spans, parse.primary)
        tokens = matcher.tokenizer(text, return_tensors="pt").to(matcher.device)

        def look(
            which: list[int], visible: Bool[Tensor, "1 N"], tokens=tokens, pieces=pieces
        ) -> tuple[Float[Tensor, "1 N"], Float[Tensor, "1"]]:
            patches = model.visual_encoder(pixels)
            seen = torch.cat([torch.ones_like(visible[:, :1]), visible], dim=1).long()
            states = model.text_encoder.bert(
                tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=patches,
                encoder_attention_mask=seen,
                return_dict=True,
            ).last_hidden_state
            logits = model.itm_head(states[:, 0])
            model.zero_grad()
            logits[0, 1].backward()
            attention, gradient = cross.get_attention_map().detach(), cross.get_attn_gradients()
            maps = aggregate(attention[0, ..., 1:], gradient[0, ..., 1:], pieces, method.aggregation)
            return maps[None], logits.detach().softmax(dim=-1)[:, 1]

        model.requires_grad_(True)
        cross.save_attention = True
        try:
            rows, columns = matcher.grid
            found += refine(look, 1, rows * columns, method.settings, matcher.device)
        finally:
            cross.save_attention = False
            model.zero_grad()
            model.requires_grad_(False)
    return found
