"""PCNet's conditional referring module: a sentence is understood cue by cue, and the image is looked at anew each time.

    Q_0 sentence   V_0 image
         │ q_0 "a man"  ────────────┐ stage 0: the cue, and what of the image answers to it, change the sentence, and
         ▼                          ▼          the sentence changes what is seen
        Q_1, V_1   ──►  score map S_0 = V_1 Q_1ᵀ
         │ q_1 "the man in the white shirt" ──┐ stage 1
         ▼                                    ▼
        Q_2, V_2   ──►  S_1   …

Each image meets T sentences with T cues: its own, and those of the other images of the batch, which are wrong for it.

V_0, Q_0 and q_n lie in CLIP's joint space, where patches and texts can be compared. The module begins as the simplest
thing that its equations can be, and leaves that space only as far as training takes it there: text-to-text attention
finds in each sentence's own cue itself and adds it, everything else adds nothing.

Source: Yang et al., "Boosting Weakly Supervised Referring Image Segmentation via Progressive Comprehension", NeurIPS
2024, §3.2. Equations as in the paper. Its released code makes each change a tenth as large; with that ours hardly
listened to its cues. As there, everything has length 1 when it comes in.

Shapes: B images, T texts, n visual tokens, C channels, N stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wris_lib.errors import WrisError

MODULATIONS = ("ADD", "TTA", "VTA+ADD", "VTA+TTA")
SHARPNESS = 20.0  # of attention at the start: softmax(20 · cosine)


@dataclass(frozen=True)
class CrmConfig:
    """Sizes and choices.

    Args:
        channels: C, of CLIP's joint space; 1024 in the paper (RN50).
        stages: N. With 0 there is no module: sentences are compared with the image as they are (TRIS).
        modulation: how a cue changes the sentence: "VTA" asks the image what answers to the cue (vision-to-text
            attention), "TTA" lets the sentence attend to cues, "ADD" adds the cue to it.
        temperature: of the scores, which are cosines; ln(1/0.07) = 2.7 in the released code.

    Raises:
        WrisError: there is no such modulation.
    """

    channels: int
    stages: int = 2
    modulation: str = "TTA"
    temperature: float = 6.0

    def __post_init__(self) -> None:
        if self.modulation not in MODULATIONS:
            raise WrisError(f"there is no modulation {self.modulation!r}; choose one of: {', '.join(MODULATIONS)}.")


class Adapter(nn.Module):
    """x + Wx + b, of length 1. It begins with W = 0: CLIP's features as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Linear(channels, channels)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, x: Float[Tensor, "*b C"]) -> Float[Tensor, "*b C"]:
        return F.normalize(x + self.change(x), dim=-1)


class CrossAttention(nn.Module):
    """softmax(X W1 (Y W2)ᵀ / √C) Y W3, with one head, as in the paper; X and Y of length 1.

    It begins as softmax(20 · X Yᵀ) Y.

    Args:
        channels: C.
        silent: begin with W3 = 0 instead.
    """

    def __init__(self, channels: int, silent: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer in (self.query, self.key):
                layer.weight.copy_((SHARPNESS * channels**0.5) ** 0.5 * torch.eye(channels))
            self.value.weight.copy_((not silent) * torch.eye(channels))

    def forward(self, x: Float[Tensor, "B a C"], y: Float[Tensor, "B b C"]) -> Float[Tensor, "B a C"]:
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        alike = self.query(x) @ self.key(y).transpose(1, 2) / x.shape[-1] ** 0.5
        return alike.softmax(dim=-1) @ self.value(y)


class Mlp(nn.Module):
    """Two layers with a ReLU between. It begins as x = ReLU(x) − ReLU(−x), or, `silent`, as 0."""

    def __init__(self, channels: int, silent: bool = False) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        one = torch.eye(channels)
        with torch.no_grad():
            self.widen.weight.copy_(torch.cat([one, -one]))
            self.narrow.weight.copy_((not silent) * torch.cat([one, -one], dim=1))
        nn.init.zeros_(self.widen.bias)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Float[Tensor, "*b C"]) -> Float[Tensor, "*b C"]:
        return self.narrow(self.widen(x).relu())


class CrmStage(nn.Module):
    """One cue: q̂ = MLP(attention(q, V)) + q,  Q ← MLP(attention(Q, q̂)) + Q,  V ← V + attention(V, Q)."""

    def __init__(self, config: CrmConfig) -> None:
        super().__init__()
        channels = config.channels
        self.vision_to_text, self.text_to_text = config.modulation.startswith("VTA"), config.modulation.endswith("TTA")
        if self.vision_to_text:
            self.ask_image, self.image_mlp = CrossAttention(channels), Mlp(channels, silent=True)
        if self.text_to_text:
            self.ask_cues, self.cues_mlp = CrossAttention(channels), Mlp(channels)
        self.ask_sentences = CrossAttention(channels, silent=True)

    def forward(
        self, visual: Float[Tensor, "B n C"], sentences: Float[Tensor, "B T C"], cues: Float[Tensor, "B T C"]
    ) -> tuple[Float[Tensor, "B n C"], Float[Tensor, "B T C"]]:
        """The next V and Q.

        Args:
            visual: V.
            sentences: Q.
            cues: q, one for each sentence.
        """
        if self.vision_to_text:
            cues = cues + self.image_mlp(self.ask_image(cues, visual))
        sentences = sentences + (self.cues_mlp(self.ask_cues(sentences, cues)) if self.text_to_text else cues)
        return visual + self.ask_sentences(visual, sentences), sentences


class Crm(nn.Module):
    """Score maps of every stage."""

    def __init__(self, config: CrmConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_in, self.text_in = Adapter(config.channels), Adapter(config.channels)
        self.stages = nn.ModuleList(CrmStage(config) for _ in range(config.stages))

    def forward(
        self,
        visual: Float[Tensor, "B n C"],
        sentences: Float[Tensor, "B T C"],
        cues: Sequence[Float[Tensor, "B T C"]],
    ) -> list[Float[Tensor, "B T n"]]:
        """S of every stage, between −temperature and temperature; without stages that of the sentences as they are.

        Args:
            visual: patches of the images in CLIP's joint space.
            sentences: of every image its own and others.
            cues: of each sentence, one for each stage; more are not looked at.

        Raises:
            WrisError: there are fewer cues than stages.
        """
        if len(cues) < self.config.stages:
            raise WrisError(f"{len(cues)} cues are too few for {self.config.stages} stages; repeat some.")
        v, q = self.visual_in(visual), self.text_in(sentences)
        maps = [] if self.config.stages else [self._scores(v, q)]
        for stage, cue in zip(self.stages, cues, strict=False):
            v, q = stage(v, q, self.text_in(cue))
            maps.append(self._scores(v, q))
        return maps

    def _scores(self, visual: Float[Tensor, "B n C"], sentences: Float[Tensor, "B T C"]) -> Float[Tensor, "B T n"]:
        cosines = F.normalize(sentences, dim=-1) @ F.normalize(visual, dim=-1).transpose(1, 2)
        return self.config.temperature * cosines


def response_maps(scores: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """R = norm01(ReLU(S)): 0 where nothing answers, 1 where most does. A map without any answer is 0 everywhere."""
    positive = scores.relu()
    low, high = positive.amin(dim=-1, keepdim=True), positive.amax(dim=-1, keepdim=True)
    return (positive - low) / (high - low).clamp(min=1e-6)
