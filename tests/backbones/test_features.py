"""What is kept of CLIP and SAM is what they compute, and what it depends on is known."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import sam_model_registry

import wris_lib
from tests.backbones import test_clip
from wris_lib.backbones import clip as clip_module
from wris_lib.backbones import features
from wris_lib.backbones.clip import Clip, create_clip
from wris_lib.backbones.feature_store import Rows, open_features
from wris_lib.backbones.features import clip_patches, clip_words, fingerprint, image_files, sam_embeddings, texts
from wris_lib.backbones.sam import SamImage, Segmenter
from wris_lib.files import sha256

clip, tokenizer = test_clip.clip, test_clip.tokenizer

SIZES = [(50, 40), (30, 60), (64, 64)]  # width, height
HALF = {"atol": 2e-3, "rtol": 2e-3}
EXPRESSIONS = ["the red dog", "car", "", "a car left of the man"]


def picture(row):
    width, height = SIZES[row]
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


COMPOSED = Rows([f"noise {row} {size}" for row, size in enumerate(SIZES)], picture)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WRIS_CACHE", str(tmp_path / "cache"))


def test_patches_are_clips(clip):
    store = open_features(clip_patches(clip, (4, "surgery", 1)), COMPOSED)
    found = store[[2, 0]]
    assert list(found) == ["stage 4", "surgery", "stage 1"]
    for place, row in enumerate((2, 0)):
        image = clip.preprocess(picture(row))[None]
        for values, expected in zip(found.values(), clip.patch_features(image, (4, "surgery", 1)), strict=True):
            assert values.dtype == torch.float16
            torch.testing.assert_close(values[place].float(), expected[0], **HALF)


def test_words_are_clips(clip):
    found = open_features(clip_words(clip), texts(EXPRESSIONS))[[3, 0, 1]]
    chosen = [EXPRESSIONS[row] for row in (3, 0, 1)]
    words, mask = clip.word_features(chosen)
    assert torch.equal(found["words mask"], mask)
    torch.testing.assert_close(found["words"].float(), words * mask[..., None], **HALF)
    torch.testing.assert_close(found["sentence"].float(), clip.text_features(chosen), **HALF)


def test_an_image_embedding_can_be_decoded_as_if_it_were_fresh():
    torch.manual_seed(0)
    segmenter = Segmenter(sam_model_registry["wris_toy"]())
    found = open_features(sam_embeddings(segmenter), COMPOSED)[[1]]
    assert found["embedding"].dtype == torch.float16
    fresh = segmenter.embed(picture(1))
    kept = SamImage(
        found["embedding"].float(), tuple(found["original_size"][0].tolist()), tuple(found["input_size"][0].tolist())
    )
    assert kept.original_size == fresh.original_size == (60, 30) and kept.input_size == fresh.input_size
    point, label = torch.tensor([[[10.0, 20.0]]]), torch.tensor([[1]])
    expected, decoded = (segmenter.decode(image, point, label).logits for image in (fresh, kept))
    torch.testing.assert_close(decoded, expected, **HALF)


def test_image_files_are_known_by_their_bytes(clip, tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for row, path in enumerate(paths):
        picture(row).save(path)
    rows = image_files(paths)
    assert rows.keys == [sha256(path) for path in paths]
    encoder = clip_patches(clip, (1,))
    first = open_features(encoder, rows)
    assert torch.equal(first[[0, 1]]["stage 1"], open_features(encoder, COMPOSED)[[0, 1]]["stage 1"])
    os.rename(paths[0], tmp_path / "other name.png")
    assert open_features(encoder, image_files([tmp_path / "other name.png", paths[1]])).folder == first.folder
    picture(2).save(paths[1])
    assert open_features(encoder, image_files([tmp_path / "other name.png", paths[1]])).folder != first.folder


def test_settings_are_what_the_numbers_depend_on(tokenizer):
    def clip(**options):
        return Clip(test_clip.tiny_model(), tokenizer, **{"dense_size": 48, "device": "cpu"} | options)

    patches = clip_patches(clip(), (1, 2))
    assert patches.settings == clip_patches(clip(), (1, 2), 48).settings
    assert clip_words(clip()).settings != clip_words(clip(prompts=("a {}",))).settings
    for other in (
        clip_patches(clip(), (2, 1)),
        clip_patches(clip(), (1, 2), 64),
        clip_patches(clip(dense_size=64), (1, 2)),
        clip_patches(clip(surgery_from=1), (1, 2)),
    ):
        assert other.settings != patches.settings and other.origin == patches.origin


def test_every_weight_that_is_used_is_part_of_the_origin(clip):
    patches, words = clip_patches(clip, (1,)).origin, clip_words(clip).origin
    assert patches == clip_patches(clip, (1,)).origin and words == clip_words(clip).origin
    clip.model.token_embedding.weight[5, 3] += 1e-6
    assert clip_patches(clip, (1,)).origin == patches
    assert clip_words(clip).origin != words
    clip.model.visual.proj[1, 1] += 1e-6
    assert clip_patches(clip, (1,)).origin != patches


def test_what_no_weight_shows_is_part_of_the_origin_too():
    origins = [fingerprint(test_clip.tiny_model(quick_gelu).visual, ())["weights"] for quick_gelu in (False, True)]
    assert origins[0] != origins[1]


@pytest.mark.parametrize("part", ["code", "versions"])
def test_changed_code_makes_other_features(clip, tmp_path, monkeypatch, part):
    before = open_features(clip_patches(clip, (1,)), COMPOSED).folder
    if part == "versions":
        monkeypatch.setattr(features, "version", lambda package: "99")
    else:
        changed = tmp_path / "clip.py"
        changed.write_text(Path(clip_module.__file__).read_text() + "# changed\n")
        monkeypatch.setattr(features, "CLIP_CODE", (changed, *features.CLIP_CODE[1:]))
    assert open_features(clip_patches(clip, (1,)), COMPOSED).folder != before


def test_every_file_of_ours_that_runs_is_part_of_the_code(clip, tmp_path):
    path = tmp_path / "picture.png"
    picture(0).save(path)
    images, package = image_files([path]), Path(wris_lib.__file__).parent
    segmenter = Segmenter(sam_model_registry["wris_toy"]())
    for encoder, rows, code in (
        (clip_patches(clip, (1, "surgery")), images, features.CLIP_CODE),
        (clip_words(clip), texts(EXPRESSIONS), features.CLIP_CODE),
        (sam_embeddings(segmenter), images, features.SAM_CODE),
    ):
        ran = set()
        sys.setprofile(lambda frame, event, _, ran=ran: ran.add(Path(frame.f_code.co_filename)))
        try:
            encoder.encode([rows.load(0)])
        finally:
            sys.setprofile(None)
        ran = {file for file in ran if package in file.parents}
        assert ran and ran <= {Path(file) for file in (*features.SHARED_CODE, *code)}


def test_a_toy_image_takes_the_documented_bytes():
    model, tokenizer = create_clip("wris-toy", seed=0)
    toy = Clip(model, tokenizer, dense_size=256, device="cpu")
    segmenter = Segmenter(sam_model_registry["wris_toy"]())
    rows = Rows(["a picture"], lambda row: picture(row).resize((256, 256)))
    for encoder, size in (
        (clip_patches(toy, (2, 4, "surgery")), 2 * 98_304 + 65_536),
        (sam_embeddings(segmenter), 110_592 + 2 * 2 * 8),
    ):
        folder = open_features(encoder, rows).folder
        assert sum(path.stat().st_size for path in folder.glob("*.bin")) == size
