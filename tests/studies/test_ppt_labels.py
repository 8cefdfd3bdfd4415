"""How right PPT's labels are: pseudo-labels and selections by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.studies.test_ppt_studies import check_form
from wris_lib.backbones.feature_store import Rows
from wris_lib.data.objects import ObjectImage
from wris_lib.methods.ppt.compose import ObjectPicture
from wris_lib.methods.ppt.curriculum import Round, Training
from wris_lib.methods.ppt.labels import UNKNOWN, Collector
from wris_lib.methods.ppt.pseudo import LabelledImages
from wris_lib.studies import ppt_labels


def box(side: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


TWO = [("b.png", box(8, 0, 0, 8, 4)), ("a.png", box(8, 4, 4, 8, 8))]


def test_pseudo_labels_by_hand(tmp_path, monkeypatch):
    """Two pictures, one of them kept at half its size; three expressions about two images of 8 pixels a side."""
    objects = [ObjectImage(tmp_path / f"{number}.png", "dog") for number in range(3)]
    truth = [box(8, 0, 0, 8, 8), box(8, 0, 0, 8, 4), box(8, 0, 0, 4, 8)]
    pictures = [  # the first of the three was left out as doubtful
        ObjectPicture(np.zeros((8, 8, 3), np.uint8), box(8, 0, 0, 8, 8), "dog", 1),  # IoU 32 / 64
        ObjectPicture(np.zeros((4, 4, 3), np.uint8), box(4, 1, 0, 3, 4), "dog", 2),  # 4 / 12
    ]
    scenes = [tmp_path / "a.png", tmp_path / "b.png"]
    about = [(scenes[1], "red dog", box(8, 0, 0, 4, 4)), (scenes[0], "dog of man", box(8, 4, 4, 8, 8))]
    about += [(scenes[1], "dog of man", box(8, 0, 0, 8, 4)), (scenes[0], "red dog", box(8, 0, 0, 1, 1))]
    collector = Collector(4)  # cells of 2 × 2 pixels; images are numbered as they first appear: b, a
    collector.add("red dog", 0, box(8, 0, 0, 4, 8)[None], 0)  # H_sem: IoU 4 / 8
    collector.add("dog of man", 0, np.stack([box(8, 0, 0, 8, 2), box(8, 0, 0, 8, 6)]), UNKNOWN)  # 4 / 8 and 8 / 12
    collector.add("dog of man", 1, np.stack([box(8, 0, 0, 4, 4), box(8, 4, 4, 8, 6)]), UNKNOWN)  # 0 and 2 / 4
    labelled = LabelledImages(Rows(["b", "a"], lambda row: None), collector.finish())
    splits = {
        "toyobjects:train": [
            SimpleNamespace(image_path=each.image_path, mask=mask) for each, mask in zip(objects, truth, strict=True)
        ],
        "toyref:train": [SimpleNamespace(image_path=p, expression=text, mask=mask) for p, text, mask in about],
    }
    for name in ("load_clip", "load_sam"):
        monkeypatch.setattr(ppt_labels, name, lambda stack: None)
    monkeypatch.setattr(ppt_labels.toyworld, "ensure", lambda: tmp_path)
    monkeypatch.setattr(ppt_labels, "ObjectImages", lambda folder: SimpleNamespace(items=objects))
    monkeypatch.setattr(ppt_labels.data, "load", lambda split: SimpleNamespace(items=splits[split]))
    monkeypatch.setattr(ppt_labels.data, "load_training", lambda split: SimpleNamespace(items=splits[split]))
    monkeypatch.setattr(ppt_labels.datasets, "object_pictures", lambda *given: pictures)
    monkeypatch.setattr(ppt_labels.datasets, "candidates", lambda *given: labelled)
    # The paper's way: "dog" has IoU 1 / 4 with what "dog of man" and 1 / 1 with what "red dog" means in b, "man" 2 / 4.
    answers = {"dog": box(8, 0, 0, 4, 4), "man": box(8, 0, 0, 8, 2)}
    things = {"red dog": ["dog"], "dog of man": ["dog", "man"]}
    # The shipped generator chooses the second candidate of "dog of man" in b, and finds none in a.
    generator = SimpleNamespace(config=None)
    monkeypatch.setattr(ppt_labels, "load_method", lambda name, stack: SimpleNamespace(generator=generator))
    monkeypatch.setattr(ppt_labels, "h_alone", lambda clip, segmenter, config, h: h)
    chosen = {(1, 2): np.array([1, UNKNOWN])}
    monkeypatch.setattr(ppt_labels, "select", lambda generator, segmenter, h, numbers: chosen[tuple(numbers)])
    asked = []

    def predict(image, phrases):
        asked.append((image, phrases))
        return [SimpleNamespace(mask=answers[phrase]) for phrase in phrases]

    monkeypatch.setattr(ppt_labels, "PAPERS_WAY", 1)  # image: the first, b
    monkeypatch.setattr(ppt_labels, "ClipSam", lambda clip, segmenter: SimpleNamespace(predict=predict))
    monkeypatch.setattr(ppt_labels, "load_image", lambda path: path.name)
    monkeypatch.setattr(ppt_labels, "load_parser", lambda stack: SimpleNamespace(parse=lambda texts: texts))
    monkeypatch.setattr(ppt_labels.pseudo, "things", things.get)
    ppt_labels.pseudo_labels(tmp_path / "results")
    results = json.loads((tmp_path / "results" / "ppt_pseudolabels.json").read_text())
    check_form(results, "train ppt --pseudo-labels", [0])
    found = {each["name"]: (each["n"], *each["metrics"].values()) for each in results["rows"]}
    assert found == {
        "D_sem, D_ref: objects of the pictures": (2, pytest.approx(100 * (1 / 2 + 1 / 3) / 2, abs=0.01), 50.0),
        "H_sem: CLIP's choice": (1, 50.0, 100.0),
        "H_sem: best candidate": (1, 50.0, 100.0),
        "H_ref: CLIP's choice": (2, pytest.approx(100 * (1 / 2 + 0) / 2, abs=0.01), 50.0),
        "H_ref: Select, by the shipped generator": (1, pytest.approx(100 * 2 / 3, abs=0.01), 100.0),
        "H_ref: best candidate": (2, pytest.approx(100 * (2 / 3 + 1 / 2) / 2, abs=0.01), 100.0),
        "paper's way: the answer to the only noun phrase": (1, 100.0, 100.0),
        "paper's way: the best answer to a noun phrase": (1, 50.0, 100.0),
    }
    assert asked == [("b.png", ["dog", "man"])]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds' trainings that are done, with two expressions of H_ref between one of H_sem; folder of results."""
    b = [("red dog", box(8, 0, 0, 4, 4)), ("dog of man", box(8, 0, 0, 8, 4))]
    items = [SimpleNamespace(image_path="b.png", expression=text, mask=mask) for text, mask in b]
    items.append(SimpleNamespace(image_path="a.png", expression="dog of man", mask=box(8, 4, 4, 8, 8)))
    collector = Collector(4)  # cells of 2 × 2 pixels
    collector.add("dog of man", 0, np.stack([box(8, 0, 4, 8, 8), box(8, 0, 0, 8, 6)]), UNKNOWN)  # IoU 0 and 8 / 12
    collector.add("red dog", 0, box(8, 0, 0, 4, 8)[None], 0)
    collector.add("dog of man", 1, np.stack([box(8, 4, 4, 8, 6), box(8, 0, 0, 4, 4)]), UNKNOWN)  # 2 / 4 and 0
    labelled = LabelledImages(Rows(["b", "a"], lambda row: None), collector.finish())
    choices = {0: {2: [1, UNKNOWN], 3: [0, 0]}, 1: {2: [0, 1], 3: [1, 0]}}  # seed -> round -> of each expression
    runs = {}
    for name in ("full", "plain"):
        for seed in choices:
            folder, training = tmp_path / f"{name} {seed}", Training(steps=50)
            runs[name, seed] = SimpleNamespace(folder=folder, training=training, finished=True)
    for seed, rounds in choices.items():
        for number, chosen in rounds.items():
            place = runs["full", seed].folder / f"round {number}"
            place.mkdir(parents=True)
            np.save(place / "referents.npy", np.array(chosen))
    for name in ("load_clip", "load_sam"):
        monkeypatch.setattr(ppt_labels, name, lambda stack: None)
    for name in ("load", "load_training"):
        monkeypatch.setattr(ppt_labels.data, name, lambda split: SimpleNamespace(items=items))
    monkeypatch.setattr(ppt_labels.datasets, "candidates", lambda *given: labelled)
    one = Round(1, ("H_sem", "H_ref"), 0.3)
    monkeypatch.setattr(ppt_labels, "CURRICULA", {"full": (one, one, one), "plain": (one,)})
    monkeypatch.setattr(ppt_labels, "ROWS", {"2": ("plain", 3), "4": ("full", 2), "5": ("full", 3)})
    monkeypatch.setattr(ppt_labels, "recipe_of", lambda runs: ["a recipe"])
    monkeypatch.setattr(
        ppt_labels, "ablation_runs", lambda steps, seeds: {key: run for key, run in runs.items() if key[1] in seeds}
    )
    return tmp_path / "results"


def test_selections_by_hand(finished: Path):
    ppt_labels.selections(seeds=(0, 1), folder=finished)
    results = json.loads((finished / "ppt_select.json").read_text())
    check_form(results, "train ppt --selections", [0, 1], steps=50, recipe=["a recipe"])
    assert all((each["data"], each["n"]) == ("toyref:train", 2) for each in results["rows"])
    found = {each["name"]: each["metrics"]["IoU at least 0.5"]["seeds"] for each in results["rows"]}
    assert found == {
        "CLIP's choice": [50.0, 50.0],
        "best candidate": [100.0, 100.0],
        "5, round 2": [100.0, 0.0],  # of those with a choice
        "5, round 3": [50.0, 100.0],
    }


def test_selections_seed_by_seed(finished: Path):
    ppt_labels.selections(seeds=(0, 1), folder=finished)
    whole = json.loads((finished / "ppt_select.json").read_text())
    (finished / "ppt_select.json").unlink()
    for seed in (1, 0):
        ppt_labels.selections(seeds=(seed,), folder=finished)
    single = json.loads((finished / "ppt_select.json").read_text())
    assert single["seeds"] == [0, 1] and single["rows"] == whole["rows"]


def test_a_text_about_two_images_has_the_truth_of_each():
    """IoU of candidates with the right one of two masks that the same words name."""
    truth = [(Path(name), "dog", mask) for name, mask in TWO]
    collector = Collector(4)
    for image in (0, 1):
        collector.add("dog", image, np.stack([mask for _, mask in TWO]), UNKNOWN)
    assert [each.tolist() for each in ppt_labels.candidate_ious(collector.finish(), truth)] == [[1.0, 0.0], [0.0, 1.0]]
