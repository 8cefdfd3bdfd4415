"""Draft of notebook 05: writes ./05.ipynb from cells; texts that depend on what was seen are in notes.py."""

import nbformat, sys
from nbformat.v4 import new_notebook, new_markdown_cell, new_code_cell

sys.path.insert(0, ".")
from notes import *

cells = []


def md(id, text):
    c = new_markdown_cell(text.strip("\n"))
    c["id"] = id
    cells.append(c)


def code(id, text, hidden=False):
    c = new_code_cell(text.strip("\n"))
    c["id"] = id
    if hidden:
        c["metadata"]["jupyter"] = {"source_hidden": True}
    cells.append(c)


def exercise(n, title, text, name, args, hint, solution):
    md(f"exercise-{n}", f"### Exercise {n}: {title}\n\n{text.strip()}")
    code(f"exercise-{n}-stub", f"def {name}({args}):\n    raise NotImplementedError  # your lines instead")
    code(f"exercise-{n}-check", f"exercises_iterprime.check_{name}({name});")
    md(
        f"exercise-{n}-hint",
        f"<details><summary>Hint</summary>\n\n{hint.strip()}\n\n</details>\n\nThe solution is in the next cell, folded.",
    )
    code(
        f"exercise-{n}-solution",
        f"{solution.strip()}\n\n\nassert exercises_iterprime.check_{name}({name})",
        hidden=True,
    )


md(
    "title",
    f"""
# 05 · What would make the sentence true?

Nobody has trained the model of this notebook to find anything. It was asked one question: *does this sentence belong to this
picture?* To answer "the cat on the left" with yes, it must have looked at the cat on the left, and a gradient tells where that was.
**IteRPrimE** (*Iterative Grad-CAM Refinement and Primary word Emphasis*, AAAI 2025) makes masks of that: **zero-shot**, without any
training for the task. It adds two ideas. The sentence has one word that names the thing, so listen to that word most. And what was
found at first may be the smaller part of it, so hide it and look again.

**After this notebook you can**

- say what attention and Grad-CAM show of a model, and why they are not the same;
- turn the maps of a sentence's words into one map in five ways, among them the paper's (PWEM);
- follow the refinement pass by pass (IGRS), and say what it heals and what it breaks;
- choose a mask by a map among proposals;
- make such maps an order of magnitude faster without changing them.

| | two CPU cores | a GPU |
|---|---|---|
| all cells, the first time: SAM makes proposals | about {MINUTES_FIRST} minutes | not needed |
| all cells, from then on | about {MINUTES_AGAIN} minutes | not needed |
| reading, with three exercises | 50 minutes | |

**Read before:** [notebook 01](01_clip_sam_failures.ipynb). Beside it lies §3 of *IteRPrimE: Zero-shot Referring Image Segmentation
with Iterative Grad-CAM Refinement and Primary Word Emphasis* ([arXiv 2503.00936](https://arxiv.org/abs/2503.00936)).
""",
)
code(
    "imports",
    """
import matplotlib.pyplot as plt
import numpy as np
import torch

import wris_lib
from wris_lib import evaluate, exercises_iterprime, report, show
from wris_lib.data import load
from wris_lib.data.images import load_image
from wris_lib.data.toyworld import build
from wris_lib.methods import load_method
from wris_lib.show import Panel

plt.rcParams["figure.dpi"] = 72
print("wris_lib", wris_lib.__version__, "· torch", torch.__version__)
""",
)
md(
    "match",
    """
## 1 · A model that can say no

CLIP compares two vectors, one for the image and one for the sentence. **ALBEF** goes further. After half of the sentence's layers
its words may look at patches of the image (*cross-attention*), and a small head on the first token, `[CLS]`, says *matched* or *not
matched* (ITM, image–text matching). It has learnt that from captions that belong to their picture and captions that do not. The
course's ALBEF is of the same classes as the original, LAVIS's, only small.

Ask it about one scene. What does it believe?
""",
)
code(
    "match-code",
    """
scenes = load("toyref:val").items
rng = np.random.default_rng(5)
drawn = [scenes[index] for index in rng.choice(len(scenes), 3, replace=False)]

iterprime = load_method("iterprime", device="cpu")
matcher = iterprime.matcher
image = load_image(drawn[0].image_path)
encoded = matcher.encode_images(matcher.preprocess(image)[None])
claims = [item.expression for item in scenes if item.image_path == drawn[0].image_path]
claims += ["purple elephant", "the cow", "the pizza left of the umbrella"]
believed = matcher.match(encoded, matcher.encode_texts(["there is a " + claim for claim in claims])).probability
for claim, probability in zip(claims, believed.tolist(), strict=True):
    print(f"{probability:5.0%}  there is a {claim}")
show.grid([Panel(image, "the picture that is spoken of")], inches=3)
""",
)
md("match-note", MATCH_NOTE)
md(
    "cam",
    r"""
## 2 · Looking is not yet believing

In one of the layers with cross-attention, take what every word looks at: **attention** $A$, for each head, word and patch a number,
1 in sum over the patches. Words look at many things that do not matter. So ask how the answer "matched" would change if a word
looked a little more at a patch: the **gradient** $\partial y / \partial A$, where $y$ is the logit of *matched*. What is positive of
it is $G$, and

$$H = A \odot G$$

is **Grad-CAM**: where a word looks *and* this speaks for the sentence. Here are both for every token of one sentence (means over
heads):
""",
)
code(
    "cam-code",
    """
item = drawn[1]
image = load_image(item.image_path)
encoded = matcher.encode_images(matcher.preprocess(image)[None])
text = "there is a " + item.expression
texts = matcher.encode_texts([text])
match = matcher.match(encoded, texts)
attention, gradient = match.attention[0], match.gradient[0].relu()
names = ["[CLS]", *(text[start:end] for start, end in texts.spans[0][1:-1]), "[SEP]"]

panels = []
for title, maps in (("attention", attention), ("Grad-CAM", attention * gradient)):
    per_token = maps.mean(dim=0).unflatten(1, matcher.grid).numpy()
    panels += [
        Panel(image, f"{title}: {name}", response_map=per_token[token], referent=item.mask)
        for token, name in enumerate(names)
    ]
print(f"“{text}”: {match.probability[0]:.0%} matched, layer {matcher.layer} of {matcher.layers}")
show.grid(panels, columns=len(names), inches=1.3)
""",
)
md("cam-note", GRADCAM_NOTE)
md(
    "pwem",
    r"""
## 3 · One map for a sentence

A map for every token has to become one. The paper compares five ways, each a mean over some maps and over the heads, scaled to 0…1:

| | which maps |
|---|---|
| `mean` | those of all tokens |
| `gvlp` | those of words with a meaning: nouns, adjectives, verbs, numbers (*effective words*) |
| `local` | the primary word's map, weighed by how its attention *differs* from that of each other effective word |
| `global` | those of the effective words, and that of the primary word as often again as there are effective words |
| `pwem` | `[CLS]`, local and global together: **primary word emphasis** |

The **primary word** is the noun that the others qualify: the last noun of the first noun phrase. The parser finds it. The local maps
are, with $m$ the primary word and $c$ another one,

$$H_l = \frac{A_m - A_c}{\lVert A_m - A_c \rVert} \odot G_m \odot (A_m \odot G_m)$$

where the norm goes over the other words. Patches that a context word looks at more than the primary word count *against*.
""",
)
code(
    "pwem-code",
    """
from wris_lib.methods.iterprime.gradcam import AGGREGATIONS

panels = []
for item in drawn:
    image = load_image(item.image_path)
    primary = iterprime.parser.parse([item.expression])[0].primary
    panels.append(Panel(image, f"“{item.expression}” (primary: {primary.text})", referent=item.mask))
    for aggregation in AGGREGATIONS:
        one_look = load_method("iterprime", device="cpu", aggregation=aggregation, passes=0)
        (found,) = one_look.look(image, [item.expression])
        response = found.response_map.unflatten(0, matcher.grid).numpy()
        panels.append(Panel(image, aggregation, response_map=response, referent=item.mask))
show.grid(panels, columns=1 + len(AGGREGATIONS), inches=1.8)
""",
)
md("pwem-note", PWEM_NOTE)
exercise(
    1,
    "what is the primary word's own? · medium, 10 minutes",
    r"""
Write the first factor of $H_l$. `A_m` is [heads, N], the primary word's attention; `A_c` is [heads, C, N], that of C other tokens.
Return $(A_m - A_c) / \lVert A_m - A_c \rVert$ as [heads, C, N]. The norm is taken over the C tokens, for each head and patch by
itself; where it is 0, divide by 1e-8. Both are numpy arrays.
""",
    "primary_difference",
    "A_m, A_c",
    "`A_m[:, None]` makes [heads, 1, N] of [heads, N]; `np.linalg.norm` has `axis` and `keepdims`.",
    """
def primary_difference(A_m, A_c):
    difference = A_m[:, None] - A_c
    return difference / np.maximum(np.linalg.norm(difference, axis=1, keepdims=True), 1e-8)
""",
)
md(
    "igrs",
    r"""
## 4 · Hide what was found, and look again

A gradient goes where a model finds it easiest to believe, and that may be a wheel and not the car. **Iterative refinement** (IGRS)
hides what has answered and asks again. With $\sigma$ a steep sigmoid, scaled so that the strongest patch gets 1:

$$M_t = M_{t-1} \wedge [\sigma(H_t) < \theta] \qquad E_t = \lambda\, E_{t-1} + (1-\lambda)\, H_t \qquad S_t = \mathrm{ITM}_t \cdot
\mathrm{mean}(1 - \tilde E_{t-1})$$

$M$ says which patches words may look at in the next pass, $E$ is the map that is returned, and $S$ decides: when it falls, the pass
is thrown away, and it is over. At most $\nu$ passes are made after the first look. The paper has $\nu = 3$, $\theta = 0.5$,
$\lambda = 0.8$. (Two things the paper leaves open or the authors' code does otherwise: there is no $E_{-1}$, so we compare the first
two looks by ITM alone; and their code averages $H_t$ where their formula averages $\sigma(H_t)$, and returns a map that already holds
the pass it rejects. Section 7 measures whether that matters.)

How often is a second look kept at all? Take a hundred images, and search:
""",
)
code(
    "igrs-code",
    """
by_image = {}
for item in scenes:
    by_image.setdefault(item.image_path, []).append(item)
searched = list(by_image)[::4]
looked = []
for path in searched:
    items = by_image[path]
    looked += zip(items, iterprime.look(load_image(path), [item.expression for item in items]), strict=True)

kept = np.array([sum(each.kept for each in refined.passes) - 1 for _, refined in looked])
for number in range(4):
    print(f"{number} passes kept after the first look: {np.mean(kept == number):4.0%} of {len(kept)} expressions")
""",
)
md("igrs-note", IGRS_KEPT_NOTE)
code(
    "igrs-pictures",
    """
several = [pair for pair, count in zip(looked, kept, strict=True) if count]
panels = []
for index in np.random.default_rng(2).choice(len(several), 3, replace=False):
    item, refined = several[index]
    shown = [each for each in refined.passes if each.kept][:3]
    panels.append(Panel(item.image_path, f"“{item.expression}”", referent=item.mask))
    for number in range(3):
        if number >= len(shown):
            panels.append(Panel(np.full((256, 256, 3), 255, np.uint8)))
            continue
        response = (shown[number].response_map * shown[number].visible).unflatten(0, matcher.grid).numpy()
        title = f"look {number + 1}: ITM {shown[number].probability:.2f}"
        panels.append(Panel(item.image_path, title, response_map=response, referent=item.mask))
    response = refined.response_map.unflatten(0, matcher.grid).numpy()
    panels.append(Panel(item.image_path, "E, what is returned", response_map=response, referent=item.mask))
show.grid(panels, columns=5, inches=1.9)
""",
)
md("igrs-pictures-note", IGRS_NOTE)
exercise(
    2,
    "what may the next look see? · easy, 10 minutes",
    r"""
Write one step of it. `E` and `H` are [N], the average so far and this look's map; `visible` is bool [N]; `decay` is λ, `threshold` θ.
Return the new average and what the next look may see. $\sigma(x) = s(x) / \max s$ with $s(x) = \mathrm{sigmoid}(20\,(x - 0.5))$.
""",
    "next_pass",
    "E, H, visible, decay, threshold",
    "What was hidden once stays hidden. The maximum is taken over all patches of the map.",
    """
def next_pass(E, H, visible, decay, threshold):
    s = 1 / (1 + np.exp(-20 * (H - 0.5)))
    return decay * E + (1 - decay) * H, visible & (s / s.max() < threshold)
""",
)
md(
    "choose",
    r"""
## 5 · From a map to a mask

A map of 16×16 patches is no mask. The paper takes **proposals**, masks of whatever there is, from Mask2Former, which was taught whole
objects; we take SAM's, and leave out those that lie within others. A proposal $B$ is eligible when it contains a peak of the map,
enlarged to the image's size, and does not fall into more than 12 pieces. Of the eligible ones the best is that which the map fills
best,

$$\mathrm{score}(B) = \frac{\sum (B + B \odot \tilde H)}{\sum B}$$

and where none is eligible, the best of all is taken, and the answer says so.
""",
)
code(
    "choose-code",
    """
panels = []
for item in drawn:
    image = load_image(item.image_path)
    prediction = iterprime.predict(image, [item.expression])[0]
    proposals = prediction.trace[-1]
    best = np.argsort(-proposals.scores)[:3]
    regions = {f"{proposals.scores[index]:.2f}": proposals.masks[index] for index in best}
    panels.append(Panel(image, f"“{item.expression}”", response_map=prediction.response_map, points=prediction.points))
    panels.append(Panel(image, "the three best scores; the peak decides first", regions=regions))
    panels.append(show.judged(item, prediction))
show.grid(panels, columns=3, inches=2.6)
""",
)
md("choose-note", CHOOSE_NOTE)
exercise(
    3,
    "which proposal does a map mean? · medium, 10 minutes",
    r"""
Write the choice: `H` is [h, w] in 0…1, `masks` bool [P, h, w], none empty. Return the number of the proposal with the best score among
those that contain a peak (a pixel where `H` is largest); if none does, among all.
""",
    "choose",
    "H, masks",
    "`H[mask]` gives the values inside a mask. The score is 1 plus their mean.",
    """
def choose(H, masks):
    scores = np.array([1 + H[mask].mean() for mask in masks])
    eligible = np.array([mask[H == H.max()].any() for mask in masks])
    return int(np.where(eligible | ~eligible.any(), scores, -1).argmax())
""",
)
md(
    "lab",
    """
### Your turn: turn the knobs

Another layer, another primary word, other θ, λ and ν. First by functions:
""",
)
code(
    "lab-code",
    """
from wris_lib.widgets_iterprime import RefinementLab

item = drawn[1]
lab = RefinementLab(item.image_path, item.expression, iterprime)
lab.choose_layer(matcher.layers[0])
lab.set_threshold(0.3)
lab.render()
""",
)
md(
    "lab-hand",
    """
Then by hand. Which layer points best? What happens to the map when you make a context word the primary word? Is there a θ at which a
second look is kept?
""",
)
code(
    "lab-widget",
    """
lab.set_sentence(item.expression)
lab
""",
)
md(
    "heal",
    """
## 6 · What refinement heals, and what it breaks

Pictures of successes prove nothing. Count: of the expressions that the first look answers wrongly (IoU below ½), how many are right
after refinement, and how many the other way round? A thousand expressions each:
""",
)
code(
    "heal-code",
    """
import json

study = json.loads((report.RESULTS / "iterprime_ablation.json").read_text())
for split, counts in study["healing"].items():
    print(f"{split:13} healed {counts['healed']}, broken {counts['broken']}, of {counts['n']}")
""",
)
md(
    "heal-search",
    """
And see some. Among the images searched above, draw two of each kind at random, if there are so many:
""",
)
code(
    "heal-pictures",
    """
from wris_lib.methods.iterprime.selection import choose as choose_proposal
from wris_lib.methods.iterprime.selection import upsample

changed = {"healed": [], "broken": []}
for item, refined in [pair for pair, count in zip(looked, kept, strict=True) if count]:
    image = load_image(item.image_path)
    proposals = iterprime.propose(image)
    maps = [refined.passes[0].response_map, refined.response_map]
    large = [upsample(each.unflatten(0, matcher.grid), (image.height, image.width)) for each in maps]
    masks = [proposals[choose_proposal(each, proposals).index] for each in large]
    right = [evaluate.iou(mask, item.mask) >= 0.5 for mask in masks]
    if right[0] != right[1]:
        changed["healed" if right[1] else "broken"].append((item, large, masks))

panels = []
for name, cases in changed.items():
    for index in np.random.default_rng(0).permutation(len(cases))[:2]:
        item, large, masks = cases[index]
        for title, response, mask in zip((f"{name}: “{item.expression}”", "refined"), large, masks, strict=True):
            panels.append(Panel(item.image_path, title, response_map=response, referent=item.mask))
            panels.append(Panel(item.image_path, mask=mask, referent=item.mask))
print({name: len(cases) for name, cases in changed.items()}, "of", len(looked))
show.grid(panels, columns=4, inches=2.1)
""",
)
md("heal-note", HEALED_NOTE)
md(
    "studies",
    """
## 7 · The studies

A thousand expressions a row (`python -m wris_lib study iterprime ablation`). No seeds here: nothing is trained, and nothing is drawn.
The whiskers are 95 % intervals from a bootstrap over images.

**Which aggregation** (the paper's Table 3)? The paper: mean < GVLP < local < global ≤ PWEM, from 43.4 to 46.5 mIoU on RefCOCO testA.
""",
)
code(
    "studies-code",
    """
def bars(table, metric="mIoU", kind=None):
    rows = [row for row in study["rows"] if row["table"] == table]
    splits = list(dict.fromkeys(row["data"] for row in rows))
    count = len(rows) // len(splits)
    figure, axes = plt.subplots(
        1, len(splits), sharey=True, figsize=(4.6 * len(splits), 0.8 + 0.3 * count), layout="constrained", squeeze=False
    )
    for ax, split in zip(axes[0], splits, strict=True):
        chosen = [row for row in rows if row["data"] == split]
        figures = [(row["kinds"][kind] if kind else row)["metrics"][metric] for row in chosen]
        means = np.array([each["mean"] for each in figures])
        reach = [means - [each["low"] for each in figures], [each["high"] for each in figures] - means]
        ax.barh([row["name"] for row in chosen], means, color="#56B4E9")
        ax.errorbar(means, range(count), xerr=reach, fmt="none", color="black", lw=1, capsize=2)
        for place, mean in enumerate(means):
            ax.text(0.3, place, f"{mean:.1f}", va="center", fontweight="bold")
        ax.set(xlabel=f"{metric} (%)", title=f"{split}" + (f", {kind}" if kind else ""))
    axes[0][0].invert_yaxis()
    plt.show()


bars("aggregation (Table 3)")
bars("aggregation (Table 3)", "PointM")
""",
)
md("studies-note", STUDIES_NOTE)
code(
    "studies-hidden",
    """
bars("hidden (Table 4)")
bars("refinement (Table 5)")
bars("refinement (Table 5)", kind="Position")
""",
)
md("studies-hidden-note", TABLES_NOTE)
code(
    "studies-sweeps",
    """
bars("passes (Figure 6)")
bars("decay (Figure 6)")
bars("deviations")
bars("ToyCut (Table 2)", "oIoU")
""",
)
md("studies-sweeps-note", SWEEPS_NOTE)
md(
    "baselines",
    """
## 8 · Beside other ways to choose

Two baselines choose among the *same* proposals by CLIP: **SAM-CLIP** cuts each one out and compares the cutting with the sentence;
**GL-CLIP** also looks at the proposal within the image. Neither can know what is on the left of the *picture*, and that was the
paper's starting point (its Figure 1c). Expressions with a direction word, *Position*, against all others:
""",
)
code(
    "baselines-code",
    """
from wris_lib.ablation_figure import read_rows

SPLIT = "toyref:val"
shown = {
    "SAM-CLIP": ("iterprime", "sam_clip"),
    "GL-CLIP": ("iterprime", "gl_clip"),
    "CLIP + SAM, by rule": ("clip_sam", "clip_sam surgery"),
    "IteRPrimE": ("iterprime", "iterprime"),
    "PCNet + SAM": ("pcnet", "pcnet sam"),
    "PPT": ("ppt", "ppt"),
}
rows = {name: read_rows(report.RESULTS / f"{file}.json", SPLIT)[row] for name, (file, row) in shown.items()}
figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
for offset, (kind, color) in enumerate((("Position", "#0072B2"), ("Others", "#E69F00"))):
    means = [row["kinds"][kind]["metrics"]["mIoU"]["mean"] for row in rows.values()]
    bars_drawn = ax.barh(np.arange(len(rows)) + 0.38 * offset, means, height=0.36, color=color, label=kind)
    ax.bar_label(bars_drawn, fmt="%.0f", padding=2)
ax.set_yticks(np.arange(len(rows)) + 0.19, rows)
ax.invert_yaxis()
ax.set_xlabel("mIoU (%), ToyRef val")
ax.legend(frameon=False)
plt.show()
""",
)
md("baselines-note", BASELINES_NOTE)
md(
    "speed",
    """
## 9 · The same maps, faster

Written down as one would first write it, each expression runs the whole model forward and backward in every pass. But the image does
not change between expressions and passes, the sentence not between passes, and of the backward pass only what lies above the layer
that is read is needed. Computed once are: the image's patches, their keys and values in all cross-attentions, and the sentence's layers
before the image comes in. All expressions of an image go through together. Measured in one run on one machine
(`python -m wris_lib study iterprime speed`):
""",
)
code(
    "speed-code",
    """
speed = json.loads((report.RESULTS / "iterprime_speed.json").read_text())
print(f"{speed['device']}, {speed['threads']} threads, {speed['date'][:10]}\\n")
for row in speed["rows"]:
    ways = (row[way]["expressions_per_second"] for way in ("straightforward", "ours"))
    print(f"{row['name']:10}", "{:6.2f} -> {:6.2f} expressions a second,".format(*ways), end=" ")
    print(f"{row['speedup']:.0f} times; maps differ by at most {row['max_abs_diff']:.0e}")
""",
)
md("speed-note", SPEED_NOTE)
md("takeaways", TAKEAWAYS)
nb = new_notebook(
    cells=cells,
    metadata={
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    },
)
nbformat.validate(nb)
for c in cells:
    if c.cell_type == "code":
        n = len(c.source.splitlines())
        if n > 25:
            print(c.id, n, "lines")
        if max(map(len, c.source.splitlines())) > 120:
            print(c.id, "long line")
nbformat.write(nb, "./05.ipynb")
