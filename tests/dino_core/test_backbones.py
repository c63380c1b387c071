"""Any timm model by its name, any module by one of its layers; sizes, pooling, attention."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dino_core.backbones import Backbone, Features, make_backbone, wrap_module
from dino_core.errors import BackboneError
from dino_core.vit import PositionInterpolation, ends_in_class_token

TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def assert_same(ours: torch.Tensor, timms: torch.Tensor) -> None:
    """But for the order of sums: we leave out the last block's products that nobody looks at."""
    torch.testing.assert_close(ours, timms, rtol=1e-5, atol=1e-5)


def tiny_vit(**options: Any) -> Backbone:  # noqa: ANN401 - passed on
    torch.manual_seed(0)
    options.setdefault("image_size_px", 32)
    kwargs = TINY_VIT | options.pop("model_kwargs", {})
    return make_backbone("vit_tiny_patch16_224", model_kwargs=kwargs, **options)


def images(count: int, height_px: int, width_px: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, height_px, width_px, generator=torch.Generator().manual_seed(7))


# One of each kind that timm has: what it is built for, its embedding, its patches, its poolings.
FAMILIES = [
    pytest.param("vit_tiny_patch16_224", 64, 192, (4, 4, 192), "cls", 3, id="ViT"),
    pytest.param(
        "vit_tiny_patch16_224.augreg_in21k", 64, 192, (4, 4, 192), "cls", 3, id="ViT by a tagged name"
    ),
    pytest.param("vit_small_patch14_reg4_dinov2", 56, 384, (4, 4, 384), "cls", 3, id="DINOv2 with registers"),
    pytest.param("vit_small_patch16_dinov3", 64, 384, (4, 4, 384), "mean", 3, id="DINOv3, rotary positions"),
    pytest.param("deit_tiny_distilled_patch16_224", 64, 192, (4, 4, 192), "cls", 3, id="two class tokens"),
    pytest.param("vit_tiny_r_s16_p8_224", 64, 192, (2, 2, 192), "cls", 3, id="ViT on a convolutional stem"),
    pytest.param("swin_tiny_patch4_window7_224", 112, 768, (4, 4, 768), "mean", 1, id="channels-last maps"),
    pytest.param("resnet18", 64, 512, (2, 2, 512), "mean", 1, id="ResNet"),
    pytest.param("convnext_atto", 64, 320, (2, 2, 320), "mean", 1, id="a norm after the pooling"),
    pytest.param("mobilenetv3_small_050", 64, 1024, (2, 2, 288), "mean", 1, id="a layer after the pooling"),
]


@pytest.mark.parametrize(("name", "size_px", "dim", "patches", "default", "poolings"), FAMILIES)
def test_every_family_gives_embedding_and_patches(
    name: str, size_px: int, dim: int, patches: tuple[int, int, int], default: str, poolings: int
) -> None:
    backbone = make_backbone(name, image_size_px=size_px).eval()
    batch = images(2, size_px, size_px)
    with torch.no_grad():
        embedding, features = backbone(batch), backbone.features(batch)
        assert_same(embedding, backbone.network(batch))  # timm's own forward
    rows, columns, patch_dim = patches
    assert embedding.shape == (2, backbone.embed_dim) == (2, dim)
    assert features.patches_BND.shape == (2, rows * columns, patch_dim)
    assert features.grid_hw == (rows, columns)
    assert backbone.default_pooling == default
    assert len(backbone.poolings) == poolings
    torch.testing.assert_close(features.pooled(backbone.default_pooling), embedding)
    for pooling in backbone.poolings:
        assert features.pooled(pooling).shape == (2, backbone.dimensions(pooling))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0",
        "tf_efficientnet_lite0",
        "regnety_002",
        "resnet50",
        "vit_base_patch16_siglip_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "mixer_s32_224",
        "cait_xxs24_224",
        "xcit_nano_12_p16_224",
        "levit_128s",
        "mobilevit_xxs",
        "efficientformer_l1",
        "edgenext_xx_small",
        "pvt_v2_b0",
        "poolformer_s12",
        "vgg11",
        "densenet121",
        "hiera_tiny_224",
        "deit3_small_patch16_224",
    ],
)
def test_other_timm_models_give_their_own_embedding(name: str) -> None:
    backbone = make_backbone(name).eval()
    batch = images(1, 224, 224)
    with torch.no_grad():
        features = backbone.features(batch)
        assert_same(backbone(batch), backbone.network(batch))
    assert features.pooled(backbone.default_pooling).shape == (1, backbone.embed_dim)
    assert features.grid_hw[0] * features.grid_hw[1] == features.patches_BND.shape[1]


def test_class_token_patches_and_mean_are_what_they_say() -> None:
    backbone = tiny_vit().eval()
    with torch.no_grad():
        tokens = backbone.network.forward_features(images(2, 32, 32))  # type: ignore[operator]
        features = backbone.features(images(2, 32, 32))
    assert features.cls_BD is not None
    assert torch.equal(features.cls_BD, tokens[:, 0])
    assert torch.equal(features.patches_BND, tokens[:, 1:])
    assert torch.equal(features.mean_BD, tokens[:, 1:].mean(1))
    assert torch.equal(features.pooled("cls+mean"), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))


def test_patches_of_a_map_run_row_by_row() -> None:
    backbone = make_backbone("resnet18").eval()
    with torch.no_grad():
        maps = backbone.network.forward_features(images(1, 64, 96))  # type: ignore[operator]
        features = backbone.features(images(1, 64, 96))
    assert features.grid_hw == (2, 3)
    assert torch.equal(features.patches_BND[0, 4], maps[0, :, 1, 1])


def test_a_network_without_class_token_says_so() -> None:
    features = Features(None, torch.zeros(1, 4), torch.zeros(1, 4, 4), (2, 2))
    with pytest.raises(BackboneError, match="needs a class token"):
        features.pooled("cls")


@pytest.mark.parametrize("position_interpolation", ["official", "bicubic", "antialias"])
@pytest.mark.parametrize(
    "model_kwargs",
    [
        {},
        {"reg_tokens": 4},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
    ],
    ids=str,
)
def test_a_vit_takes_other_sizes_and_shapes(
    position_interpolation: PositionInterpolation, model_kwargs: dict[str, Any]
) -> None:
    backbone = tiny_vit(position_interpolation=position_interpolation, model_kwargs=model_kwargs).eval()
    with torch.no_grad():
        for height_px, width_px in ((16, 16), (48, 48), (24, 64), (32, 32)):
            features = backbone.features(images(1, height_px, width_px))
            assert features.grid_hw == (height_px // 8, width_px // 8)
            assert torch.isfinite(features.patches_BND).all()


@pytest.mark.parametrize(
    "model_kwargs", [{}, {"reg_tokens": 4}, {"reg_tokens": 2, "no_embed_class": True}], ids=str
)
def test_official_interpolation_changes_nothing_but_the_resampling(model_kwargs: dict[str, Any]) -> None:
    """With positions equal everywhere there is nothing to resample, and both ways are timm's forward."""
    ours = tiny_vit(model_kwargs=model_kwargs).eval()
    timms = tiny_vit(model_kwargs=model_kwargs, position_interpolation="antialias").eval()
    for backbone in (ours, timms):
        positions = backbone.network.get_parameter("pos_embed").data
        positions[:, -16:] = positions[:, -1:]
    with torch.no_grad():
        torch.testing.assert_close(ours(images(2, 48, 48)), timms(images(2, 48, 48)))


def test_the_interpolations_differ_and_agree_at_the_native_size() -> None:
    ours, timms = tiny_vit().eval(), tiny_vit(position_interpolation="antialias").eval()
    for backbone in (ours, timms):
        nn.init.normal_(
            backbone.network.get_parameter("pos_embed"), generator=torch.Generator().manual_seed(3)
        )
    with torch.no_grad():
        assert_same(ours(images(2, 32, 32)), timms(images(2, 32, 32)))
        assert not torch.allclose(ours(images(2, 16, 16)), timms(images(2, 16, 16)), atol=1e-3)


def test_a_vit_without_positions_goes_timms_way() -> None:
    backbone = tiny_vit(model_kwargs={"pos_embed": "none"}).eval()
    with torch.no_grad():
        assert_same(backbone(images(1, 48, 48)), backbone.network(images(1, 48, 48)))


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        pytest.param("vit_tiny_patch16_224", {"model_kwargs": TINY_VIT}, 17, id="ViT"),
        pytest.param(
            "vit_tiny_patch16_224", {"model_kwargs": TINY_VIT | {"reg_tokens": 4}}, 21, id="registers"
        ),
        pytest.param(
            "vit_tiny_patch16_224", {"model_kwargs": TINY_VIT | {"qk_norm": True}}, 17, id="normed queries"
        ),
        pytest.param(
            "vit_small_patch16_dinov3", {"model_kwargs": {"depth": 2}}, 4 + 5, id="rotary positions"
        ),
        pytest.param("beit_base_patch16_224", {"model_kwargs": {"depth": 2}}, 5, id="a bias on the logits"),
    ],
)
def test_attention_is_what_the_last_block_multiplies_its_values_by(
    name: str, options: dict[str, Any], tokens: int
) -> None:
    backbone = make_backbone(name, image_size_px=32, **options).eval()
    last = list(backbone.network.blocks)[-1].attn  # type: ignore[arg-type]
    last.fused_attn = False  # timm's own, slow way then forms the weights, and sends them through a dropout
    seen: list[Tensor] = []
    last.attn_drop.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        slow = backbone.attention(images(2, 32, 32))
        last.fused_attn = True
        fused = backbone.attention(images(2, 32, 32))
    assert fused.shape[2:] == (tokens, tokens)
    assert torch.equal(slow, seen[0])
    torch.testing.assert_close(fused, seen[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.sum(-1), torch.ones_like(fused[..., 0]))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_networks_without_attention_over_all_patches_say_so(name: str) -> None:
    backbone = make_backbone(name, image_size_px=56 if name == "resnet18" else 224).eval()
    with torch.no_grad(), pytest.raises(BackboneError, match="no attention over all its patches"):
        backbone.attention(images(1, backbone.image_size_px, backbone.image_size_px))


def test_a_deep_copy_is_a_network_of_its_own() -> None:
    student = tiny_vit().eval()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        before = teacher(images(1, 48, 48))
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(teacher(images(1, 48, 48)), before)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        BackboneError, match=r"no model 'vit_smal_patch16_224': did you mean vit_small_patch16_224"
    ):
        make_backbone("vit_smal_patch16_224")
    with pytest.raises(BackboneError, match="list_models"):
        make_backbone("?")


def test_arguments_that_a_model_does_not_take_are_named() -> None:
    with pytest.raises(BackboneError, match=r"cannot build resnet18 with .*wheels"):
        make_backbone("resnet18", model_kwargs={"wheels": 4})
    with pytest.raises(BackboneError, match=r"cannot build vgg11 with .*drop_path_rate"):
        make_backbone("vgg11", drop_path=0.1)


def test_drop_path_is_for_training_and_not_part_of_the_architecture() -> None:
    student = tiny_vit(drop_path=0.5)
    assert student.model_args == tiny_vit().model_args
    rates = [module.drop_prob for module in student.modules() if type(module).__name__ == "DropPath"]
    assert rates[-1] == pytest.approx(0.5)
    assert not any(type(module).__name__ == "DropPath" for module in tiny_vit().modules())


def test_other_numbers_of_channels_are_built_and_recorded() -> None:
    backbone = tiny_vit(in_channels=5).eval()
    assert backbone.model_args["in_chans"] == backbone.in_channels == 5
    assert backbone(images(1, 32, 32, channels=5)).shape == (1, 48)
    assert tiny_vit(model_kwargs={"in_chans": 5}).in_channels == 5  # as arguments once recorded come back


def test_the_arguments_recorded_build_the_same_network_in_timm() -> None:
    backbone = tiny_vit().eval()
    rebuilt = timm.create_model(backbone.architecture, num_classes=0, **backbone.model_args).eval()
    rebuilt.load_state_dict(backbone.network.state_dict(), strict=True)
    with torch.no_grad():
        assert_same(rebuilt(images(2, 32, 32)), backbone(images(2, 32, 32)))


def test_pretrained_weights_are_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    source = tiny_vit()
    state = source.network.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    loaded = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=32,
        model_kwargs=TINY_VIT,
        pretrained_path=tmp_path / "whole.safetensors",
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.network.state_dict().items())
    save_file(
        {name: tensor for name, tensor in state.items() if name != "norm.weight"},
        tmp_path / "part.safetensors",
    )
    with pytest.raises(BackboneError, match=r"norm\.weight"):
        tiny_vit(pretrained_path=tmp_path / "part.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(BackboneError, match="cannot be read as safetensors"):
        tiny_vit(pretrained_path=tmp_path / "text.safetensors")


class TokenMixer(nn.Module):
    """Tokens in the middle, a head behind: the shape of a ViT from somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, 12, 8, stride=8)
        self.norm = nn.BatchNorm2d(12)
        self.tokens = nn.Identity()
        self.to_latent = nn.Identity()
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(12, 10)
        self.head_ran = False

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens = self.tokens(self.norm(self.patchify(images_BCHW)).flatten(2).mT)
        latent = self.to_latent(tokens.mean(1))
        self.head_ran = True
        logits: Tensor = self.head(latent)
        return logits


@pytest.mark.parametrize(
    ("layer", "dim"), [("to_latent", 12), ("tokens", 12), ("patchify", 12), (0, 12), (-1, 10)]
)
def test_any_layer_of_any_module_gives_an_embedding(layer: str | int, dim: int) -> None:
    backbone = wrap_module(TokenMixer(), layer=layer, image_size_px=32)
    assert backbone.embed_dim == dim
    assert backbone(images(2, 32, 32)).shape == (2, dim)


def test_tokens_and_maps_become_their_mean_and_vectors_stay() -> None:
    net = TokenMixer().eval()
    batch = images(2, 32, 32)
    tokens = net.norm(net.patchify(batch)).flatten(2).mT
    torch.testing.assert_close(wrap_module(net, layer="tokens")(batch), tokens.mean(1))
    torch.testing.assert_close(wrap_module(net, layer="tokens", tokens="first")(batch), tokens[:, 0])
    torch.testing.assert_close(wrap_module(net, layer="norm")(batch), tokens.mean(1))
    torch.testing.assert_close(wrap_module(net, layer="to_latent")(batch), tokens.mean(1))


def test_what_comes_after_the_layer_does_not_run_and_gets_no_gradient() -> None:
    net = TokenMixer()
    backbone = wrap_module(net, layer="to_latent")
    net.head_ran = False
    backbone(images(2, 32, 32)).sum().backward()
    assert not net.head_ran
    assert net.head.weight.grad is None
    assert net.patchify.weight.grad is not None


def test_wrapping_leaves_the_network_as_it_was() -> None:
    net = TokenMixer().train()
    net.tokens.eval()
    before = copy.deepcopy(net.state_dict())
    backbone = wrap_module(net, layer="to_latent")
    assert net.training
    assert not net.tokens.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    backbone(images(1, 32, 32))
    assert not net.to_latent._forward_hooks


def test_a_known_length_needs_no_blank_image() -> None:
    net = TokenMixer()
    assert wrap_module(net, layer="to_latent", embed_dim=12).embed_dim == 12
    assert not net.head_ran


def test_a_module_without_parameters_can_be_wrapped() -> None:
    assert wrap_module(nn.Sequential(nn.AvgPool2d(8)), layer=0, image_size_px=16).embed_dim == 3


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        pytest.param("to_laten", "did you mean to_latent", id="a typing error"),
        pytest.param("xyz", "did you mean to_latent, unused, head", id="nothing like it"),
        pytest.param(9, "there is no index 9", id="an index too high"),
        pytest.param(-7, "there is no index -7", id="an index too low"),
        pytest.param("unused", "did not run", id="a layer that never runs"),
    ],
)
def test_a_layer_that_cannot_be_used_is_refused(layer: str | int, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        wrap_module(TokenMixer(), layer=layer, image_size_px=32)


@pytest.mark.parametrize(
    ("layer", "message"), [(nn.LSTM(4, 4), "gives a tuple"), (nn.Unflatten(1, (1, 1, 3)), "expected")]
)
def test_a_layer_whose_output_is_no_embedding_is_refused(layer: nn.Module, message: str) -> None:
    net = nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(2) if isinstance(layer, nn.LSTM) else nn.Identity(), layer
    )
    if isinstance(layer, nn.LSTM):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(2), layer)
    with pytest.raises(BackboneError, match=message):
        wrap_module(net, layer=-1, image_size_px=32)


def test_a_thread_is_not_stopped_by_the_layer_of_another() -> None:
    net = TokenMixer().eval()
    backbone = wrap_module(net, layer="patchify")
    entered, leave = threading.Event(), threading.Event()

    def wait(_module: nn.Module, _args: object) -> None:
        if threading.current_thread() is waiting:
            entered.set()
            leave.wait(10)

    net.patchify.register_forward_pre_hook(wait)
    waiting = threading.Thread(target=backbone, args=(images(1, 32, 32),))
    waiting.start()
    assert entered.wait(10)
    whole = net(images(1, 32, 32))  # the other thread's hook is in place, and is not for us
    leave.set()
    waiting.join(10)
    assert whole.shape == (1, 10)


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 64), (64, 96)])
def test_the_grid_is_worked_out_for_networks_that_do_not_tell_it(height_px: int, width_px: int) -> None:
    backbone = make_backbone("xcit_nano_12_p16_224", image_size_px=64).eval()
    with torch.no_grad():
        assert backbone.features(images(1, height_px, width_px)).grid_hw == (height_px // 16, width_px // 16)


def test_tokens_that_are_no_grid_are_refused() -> None:
    class FiveTokens(nn.Module):
        num_features = 4

        def forward_features(self, images_BCHW: Tensor) -> Tensor:
            return images_BCHW.new_zeros(len(images_BCHW), 5, 4)

        def forward_head(self, tokens_BND: Tensor) -> Tensor:
            return tokens_BND.mean(1)

    backbone = Backbone(
        FiveTokens(),
        architecture="five",
        model_args={},
        image_size_px=32,
        in_channels=3,
        position_interpolation="official",
    )
    assert backbone(images(1, 32, 32)).shape == (1, 4)
    with pytest.raises(BackboneError, match="5 tokens, which are no grid"):
        backbone.features(images(1, 32, 32))


@pytest.mark.parametrize(
    "model_kwargs",
    [{}, {"reg_tokens": 2}, {"qkv_bias": False}, {"init_values": 0.5, "qk_norm": True}],
    ids=["plain", "registers", "no bias", "scaled and normed"],
)
@pytest.mark.parametrize("side_px", [32, 48])
def test_the_class_token_alone_has_the_numbers_and_gradients_of_all_tokens(
    model_kwargs: dict[str, object], side_px: int
) -> None:
    small = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = make_backbone(
        "vit_tiny_patch16_224", image_size_px=32, drop_path=0.5, model_kwargs={**small, **model_kwargs}
    )
    assert ends_in_class_token(backbone.network)
    backbone.double()  # in float32 some gradients are hardly more than rounding
    pictures = images(6, side_px, side_px).double()

    def results(*, alone: bool) -> list[torch.Tensor]:
        backbone.zero_grad()
        torch.manual_seed(5)  # of the dropped paths
        embedding = backbone(pictures) if alone else backbone.features(pictures).pooled("cls")
        embedding.sin().sum().backward()
        gradients = [parameter.grad for parameter in backbone.parameters()]
        return [embedding, *(gradient for gradient in gradients if gradient is not None)]

    for ours, theirs in zip(results(alone=True), results(alone=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
