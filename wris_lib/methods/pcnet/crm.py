"""PCNet's conditional referring module: a sentence is understood cue by cue, and the image is looked at anew each time.

    Q_0 sentence   V_0 image
         │ q_0 "a man"  ────────────┐ stage 0: what of the image answers to the cue changes the sentence, and the
         ▼                          ▼          sentence changes what is seen
        Q_1, V_1   ──►  score map S_0 = V_1 Q_1ᵀ
         │ q_1 "the man in the white shirt" ──┐ stage 1
         ▼                                    ▼
        Q_2, V_2   ──►  S_1   …

Each image meets T sentences with T cues: its own, and those of the other images of the batch, which are wrong for it.

Source: Yang et al., "Boosting Weakly Supervised Referring Image Segmentation via Progressive Comprehension", NeurIPS
2024, §3.2 (equations as in the paper; its released code normalises and weakens residuals, see `CrmConfig`).

Shapes: B images, T texts, n visual tokens, C channels, N stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wris_lib.errors import WrisError

MODULATIONS = ("ADD", "TTA", "VTA+ADD", "VTA+TTA")


@dataclass(frozen=True)
class CrmConfig:
    """Sizes and choices.

    Args:
        visual_channels: of the visual tokens that come in.
        word_channels: of the sentences and cues that come in.
        width: C; 1024 in the paper.
        stages: N. With 0 there is no module: sentences are compared with the image as they are (TRIS).
        modulation: how a cue changes the sentence: "VTA" asks the image what answers to the cue (vision-to-text
            attention), "TTA" lets the sentence attend to cues, "ADD" adds the cue to it.
        residual: weight of each change; 0.1 in the released code, 1 in the paper's equations.
        temperature: of the scores, which are cosines; ln(1/0.07) in the released code.

    Raises:
        WrisError: there is no such modulation.
    """

    visual_channels: int
    word_channels: int
    width: int = 128
    stages: int = 3
    modulation: str = "VTA+TTA"
    residual: float = 0.1
    temperature: float = math.log(1 / 0.07)

    def __post_init__(self) -> None:
        if self.modulation not in MODULATIONS:
            raise WrisError(f"there is no modulation {self.modulation!r}; choose one of: {', '.join(MODULATIONS)}.")


class CrossAttention(nn.Module):
    """softmax(X W1 (Y W2)ᵀ / √C) Y W3, with one head, as in the paper."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Float[Tensor, "B a C"], y: Float[Tensor, "B b C"]) -> Float[Tensor, "B a C"]:
        alike = self.query(x) @ self.key(y).transpose(1, 2) / math.sqrt(x.shape[-1])
        return alike.softmax(dim=-1) @ self.value(y)


class CrmStage(nn.Module):
    """One cue: q̂ = MLP(attention(q, V)) + q,  Q ← MLP(attention(Q, q̂)) + Q,  V ← V + attention(V, Q)."""

    def __init__(self, config: CrmConfig) -> None:
        super().__init__()
        width = config.width
        self.residual = config.residual
        self.vision_to_text, self.text_to_text = config.modulation.startswith("VTA"), config.modulation.endswith("TTA")
        if self.vision_to_text:
            self.ask_image, self.image_mlp = CrossAttention(width), _mlp(width)
        if self.text_to_text:
            self.ask_cues, self.cues_mlp = CrossAttention(width), _mlp(width)
        self.ask_sentence = CrossAttention(width)

    def forward(
        self, visual: Float[Tensor, "B n C"], sentences: Float[Tensor, "B T C"], cues: Float[Tensor, "B T C"]
    ) -> tuple[Float[Tensor, "B n C"], Float[Tensor, "B T C"]]:
        """The next V and Q.

        Args:
            visual: V.
            sentences: Q.
            cues: q, one for each sentence.
        """
        visual, sentences, cues = (F.normalize(x, dim=-1) for x in (visual, sentences, cues))
        if self.vision_to_text:
            cues = cues + self.residual * self.image_mlp(self.ask_image(cues, visual))
        change = self.cues_mlp(self.ask_cues(sentences, cues)) if self.text_to_text else cues
        sentences = sentences + self.residual * change
        return visual + self.residual * self.ask_sentence(visual, sentences), sentences


class Crm(nn.Module):
    """Score maps of every stage."""

    def __init__(self, config: CrmConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_in = nn.Linear(config.visual_channels, config.width)
        self.text_in = nn.Linear(config.word_channels, config.width)
        self.stages = nn.ModuleList(CrmStage(config) for _ in range(config.stages))

    def forward(
        self,
        visual: Float[Tensor, "B n v"],
        sentences: Float[Tensor, "B T t"],
        cues: Sequence[Float[Tensor, "B T t"]],
    ) -> list[Float[Tensor, "B T n"]]:
        """S of every stage; without stages the one of the sentences as they are.

        Args:
            visual: tokens of the images.
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


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
