"""Networks that cut their positions off are found out, and get them resampled instead."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dino_core.backbones import HookedBackbone, wrap_module
from dino_core.errors import BackboneError
from dino_core.positions import ResampledPositions, at_other_sizes
from dino_core.vit import official_positions
from tests.references.vit import LatentViT


def hooked(net: nn.Module, layer: str | int = "to_latent") -> HookedBackbone:
    return wrap_module(net.eval(), layer=layer, image_size_px=32)


def fitted(backbone: HookedBackbone, other_size_px: int = 16) -> nn.Module:
    return at_other_sizes(backbone, image_size_px=32, other_size_px=other_size_px, in_channels=3)


@pytest.mark.parametrize("batched_table", [True, False])
def test_a_net_that_cuts_its_positions_off_gets_them_resampled(batched_table: bool) -> None:
    torch.manual_seed(0)
    net = LatentViT(batched_table=batched_table)
    backbone = fitted(hooked(net))
    assert isinstance(backbone, ResampledPositions)
    assert backbone.embed_dim == 24
    images = torch.randn(2, 3, 16, 16)
    small = LatentViT(image_size_px=16, batched_table=batched_table)
    table = net.pos_embedding.reshape(1, 17, 24)
    resampled = official_positions(table[:, 1:], old_grid_hw=(4, 4), grid_hw=(2, 2))
    state = {**net.state_dict(), "pos_embedding": torch.cat([table[:, :1], resampled], dim=1)}
    state["pos_embedding"] = state["pos_embedding"].reshape(small.pos_embedding.shape)
    small.load_state_dict(state)
    own = wrap_module(small.eval(), layer="to_latent", image_size_px=16)
    torch.testing.assert_close(backbone(images), own(images))
    assert not torch.allclose(backbone(images), hooked(net)(images))


def test_the_native_size_and_oblong_images_go_through_too() -> None:
    net = hooked(LatentViT())
    backbone = fitted(net)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), net(images), rtol=0, atol=0)
    assert backbone(torch.randn(2, 3, 16, 24)).shape == (2, 24)


def test_the_table_learns_through_the_resampling() -> None:
    net = LatentViT()
    backbone = fitted(hooked(net))
    torch.autograd.backward(backbone(torch.randn(2, 3, 16, 16)).square().sum())
    assert net.pos_embedding.grad is not None
    assert (
        net.pos_embedding.grad[0].abs().sum(dim=-1) > 0
    ).sum() > 5  # five positions of a 2 x 2 image and its class


def test_a_net_that_adds_its_whole_table_as_it_stands_gets_it_resampled() -> None:
    class Strict(LatentViT):
        def forward(self, images: Tensor) -> Tensor:
            patches = self.to_patches(images).flatten(2).movedim(1, 2)
            tokens = (
                torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embedding
            )
            latent: Tensor = self.to_latent(self.transformer(tokens)[:, 0])
            return latent

    assert isinstance(fitted(hooked(Strict())), ResampledPositions)


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), -1, id="a net without positions"
        ),
        pytest.param(
            timm.create_model(
                "vit_tiny_patch16_224", img_size=32, depth=1, dynamic_img_size=True, patch_size=8
            ),
            "norm",
            id="a net that resamples by itself",
        ),
    ],
)
def test_a_net_that_takes_any_size_stays_as_it_is(net: nn.Module, layer: str | int) -> None:
    backbone = hooked(net, layer)
    assert fitted(backbone) is backbone


def test_nothing_is_tried_where_there_is_one_size() -> None:
    backbone = hooked(LatentViT())
    assert fitted(backbone, 32) is backbone


def test_trying_leaves_modes_and_statistics_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1))
    net.train()
    net[2].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fitted(wrap_module(net, layer=-1, image_size_px=32))
    assert [module.training for module in net] == [True, True, False, True]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_net_that_refuses_the_size_is_refused_with_a_way_out() -> None:
    net: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, patch_size=8)
    with pytest.raises(BackboneError, match="no local crops of 16 px .* give local_size=32"):
        fitted(hooked(net, "norm"))
