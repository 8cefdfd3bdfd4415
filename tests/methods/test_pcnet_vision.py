"""What PCNet sees: the same patches fresh and from the cache, and the paper's ResNet at the paper's size."""

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from torch.nn.functional import layer_norm

from tests.backbones import test_clip
from tests.methods import test_ppt_training
from tests.methods.test_ppt_training import picture
from wris_lib.backbones.feature_store import Rows
from wris_lib.methods.pcnet.crm import Crm, CrmConfig
from wris_lib.methods.pcnet.loss import classification
from wris_lib.methods.pcnet.vision import see, see_all, see_with_resnet

tokenizer, clip = test_clip.tokenizer, test_ppt_training.clip

SIZES = [(64, 64), (48, 24), (20, 40)]


def test_patches_row_by_row(clip):
    """Of an image shown twice as large, averaged over 2 × 2 patches."""
    image = picture((64, 64), 0)
    patches, grid = see(clip, [image])
    assert grid == (4, 4) and patches.shape == (1, 16, 20)
    (fine,) = clip.patch_features(clip.preprocess(image, 64)[None], ["surgery"])
    for row, column in ((0, 0), (0, 3), (2, 1)):
        mean = fine[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(1, 2))
        torch.testing.assert_close(patches[0, 4 * row + column], layer_norm(mean, (20,)))


def test_the_cache_has_what_is_seen(clip):
    images = Rows([f"vision {size}" for size in SIZES], lambda row: picture(SIZES[row], row))
    kept = see_all(clip, images)
    fresh, _ = see(clip, [images.load(row) for row in range(3)])
    assert kept.dtype == torch.float16
    torch.testing.assert_close(kept.float(), fresh, atol=5e-3, rtol=5e-3)


# ------------------------------------------------------------------------------------------------- the paper's ResNet


def resnet(size: int, **changes: object) -> ModifiedResNet:
    torch.manual_seed(0)
    config = {"layers": (1, 1, 1, 1), "output_dim": 12, "heads": 4, "image_size": size, "width": 4}
    return ModifiedResNet(**config | changes)


def test_patches_are_what_clip_pools():
    """With attention that is everywhere alike CLIP's feature of the image is the mean over our patches."""
    visual = resnet(96).eval()
    pool, pixels = visual.attnpool, torch.randn(2, 3, 96, 96)
    for silent in (pool.q_proj.weight, pool.k_proj.weight, pool.positional_embedding):
        nn.init.zeros_(silent)
    patches = see_with_resnet(visual, pixels)
    assert patches.shape == (2, 9, 12)
    torch.testing.assert_close(patches.mean(dim=1), visual(pixels))


def test_a_single_patch_is_what_clip_pools():
    """Whatever it attends to: the mean over one patch is that patch."""
    visual = resnet(32).eval()
    nn.init.zeros_(visual.attnpool.positional_embedding)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(see_with_resnet(visual, pixels)[:, 0], visual(pixels))


def test_patches_stay_where_they_are():
    """Row by row: with everything but the last corner black, that corner's patch differs most."""
    visual, pixels = resnet(96).eval(), torch.zeros(1, 3, 96, 96)
    empty = see_with_resnet(visual, pixels)
    pixels[:, :, 64:, :32] = 1
    change = (see_with_resnet(visual, pixels) - empty).norm(dim=-1)[0]
    assert change.argmax() == 6 and change[2] < change[6] / 2


@pytest.mark.filterwarnings("error")
def test_the_papers_size_trains_down_to_the_first_layer():
    """RN50 at 320 pixels, 1024 channels, three stages: random weights, two images."""
    sizes = open_clip.get_model_config("RN50")
    vision = sizes["vision_cfg"]
    visual = resnet(
        320, layers=vision["layers"], width=vision["width"], heads=vision["width"] * 32 // 64, output_dim=1024
    )
    assert sizes["embed_dim"] == 1024
    visual.requires_grad_(False).conv1.requires_grad_(True)  # the layers between pass it on, which takes half the time
    patches = see_with_resnet(visual, torch.randn(2, 3, 320, 320))
    assert patches.shape == (2, 100, 1024)
    crm = Crm(CrmConfig(1024, stages=3, modulation="VTA+TTA"))
    texts = torch.randn(4, 1, 2, 1024).expand(-1, 2, -1, -1)
    maps = crm(patches, texts[0], [*texts[1:]])
    assert [each.shape for each in maps] == [(2, 2, 100)] * 3
    torch.stack([classification(each) for each in maps]).mean().backward()
    for first in (visual.conv1.weight, crm.text_in.change.weight, crm.stages[0].ask_sentences.value.weight):
        assert first.grad.isfinite().all() and first.grad.any()
