"""The learner against the literal training loop, its call styles, its nets, and that it learns."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from dino_core.augment import augment
from dino_core.backbones import make_backbone
from dino_core.bundle import load_bundle
from dino_core.errors import BackboneError, BundleError
from dino_core.knn import knn_accuracy
from dino_core.learner import Dino
from dino_core.learner_views import default_local_px
from dino_core.losses import teacher_logits_sum, updated_center
from dino_core.optim import clip_gradients, weight_decay_groups
from dino_core.positions import ResampledPositions
from dino_core.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, load_pixels, normalise
from tests.references import dino_loop
from tests.references.vit import LatentViT

SHARED = Path(os.environ.get("DINO_SHARED", Path(__file__).parents[2].parent / "shared"))
SMALL: dict[str, Any] = {"projection_hidden_size": 16, "num_classes_K": 24, "projection_layers": 2}


def conv_net() -> nn.Sequential:
    """Convolutions, BatchNorm, and a classifier behind the embedding."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def learner_of(net: nn.Module | None = None, **changes: object) -> Dino:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"hidden_layer": -2, "local_crops": 2, **SMALL, **changes}
    return Dino(net or conv_net(), 32, **settings)


def pictures(count: int, *, seed: int = 0, side_px: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side_px, side_px), dtype=torch.uint8, generator=generator)


def states(learner: Dino) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are bit-equal."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if torch.equal(ours[name], theirs[name])]


def one_step(learner: Dino, images: Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = learner(images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    learner.update_moving_average()
    return float(loss.item())


def test_it_is_used_as_its_predecessor_is() -> None:
    learner = Dino(
        LatentViT(),
        image_size=32,
        hidden_layer="to_latent",
        projection_hidden_size=16,
        projection_layers=4,
        num_classes_K=24,
        student_temp=0.9,
        teacher_temp=0.04,
        local_upper_crop_scale=0.4,
        global_lower_crop_scale=0.5,
        moving_average_decay=0.9,
        center_moving_average_decay=0.9,
        augment_fn=None,
        augment_fn2=None,
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)
    for seed in range(2):
        loss = learner(pictures(4, seed=seed), student_temp=0.1, teacher_temp=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
    assert torch.isfinite(loss)
    assert loss.shape == ()
    projection, embedding = learner(pictures(4), return_embedding=True)
    assert (projection.shape, embedding.shape) == ((4, 24), (4, 24))
    alone = learner(pictures(4), return_embedding=True, return_projection=False)
    torch.testing.assert_close(alone, embedding)


def test_three_steps_equal_the_literal_loop() -> None:
    # Without BatchNorm, whose statistics a literal loop of one view a forward cannot share.
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity()
    )
    learner = learner_of(net, moving_average_decay=0.9)
    literal = dino_loop.LiteralTrainer(
        learner.student, learner.student_network.head, lr=1e-3, teacher_temperature=0.04, momentum=0.9
    )
    optimizer = torch.optim.AdamW(weight_decay_groups(learner), lr=1e-3, weight_decay=0.1)
    for step in range(3):
        images = pictures(4, seed=step)
        views = augment(
            images,
            sizes_px_B2=None,
            views=learner.views,
            seed=0,
            epoch=0,
            indices_B=4 * step + torch.arange(4),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        expected = literal.step(views[:2], views[2:])
        loss = learner(images)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(learner.parameters(), max_norm=3.0, mode="per_parameter")
        optimizer.step()
        learner.update_moving_average()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(learner.center, literal.center, rtol=1e-4, atol=1e-6)
    for ours, theirs in (
        (learner.student_network, literal.student),
        (learner.teacher_network, literal.teacher),
    ):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_temperatures_of_a_call_take_the_place_of_the_learners() -> None:
    learner = learner_of().eval()
    images = pictures(4)
    default = learner(images)
    assert learner(images, student_temp=0.1, teacher_temp=0.04) == default
    assert learner(images, student_temp=0.2) != default
    assert learner(images, teacher_temp=0.07) != default


def test_a_plain_optimiser_over_all_parameters_trains_the_student_only() -> None:
    learner = learner_of(moving_average_decay=1.0)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.1, weight_decay=0.5)
    before = states(learner)
    one_step(learner, pictures(4), optimizer)
    unmoved = same(states(learner), before)
    teacher_parameters = {f"teacher_network.{name}" for name, _ in learner.teacher_network.named_parameters()}
    assert teacher_parameters <= set(unmoved)
    assert "student_network.backbone.net.0.weight" not in unmoved
    assert all(parameter.requires_grad for parameter in optimizer.state)
    assert len(optimizer.state) < len(
        list(learner.student_network.parameters())
    )  # classifier, norm of prototypes


def test_an_update_moves_the_teacher_by_its_momentum() -> None:
    learner = learner_of(moving_average_decay=0.75)
    optimizer = torch.optim.SGD(learner.student_network.parameters(), lr=0.1)
    begun = [parameter.clone() for parameter in learner.teacher_network.parameters()]
    one_step(learner, pictures(4), optimizer)
    for now, start, goal in zip(
        learner.teacher_network.parameters(), begun, learner.student_network.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.75 * start + 0.25 * goal)
    learner.update_moving_average(momentum=0.0)
    for now, goal in zip(
        learner.teacher_network.parameters(), learner.student_network.parameters(), strict=True
    ):
        torch.testing.assert_close(now, goal)


def test_the_centre_counts_every_batch_since_the_last_update() -> None:
    learner = learner_of()
    seen: list[Tensor] = []
    learner.teacher_network.head.register_forward_hook(lambda _module, _args, output: seen.append(output))
    for seed, count in ((0, 4), (1, 2)):
        learner(pictures(count, seed=seed))
    learner.update_moving_average()
    everything = torch.cat([logits.flatten(0, 1) for logits in seen])
    expected = updated_center(torch.zeros(24), *teacher_logits_sum(everything), momentum=0.9)
    torch.testing.assert_close(learner.center, expected)
    before = learner.center.clone()
    learner.update_moving_average()  # nothing seen since: the centre stays
    torch.testing.assert_close(learner.center, before, rtol=0, atol=0)


def test_the_centre_is_taken_from_the_targets() -> None:
    learner = learner_of().eval()
    images = pictures(4)
    before = learner(images)
    learner.center += torch.linspace(0, 1, 24)
    assert learner(images) != before


def test_an_evaluation_changes_nothing() -> None:
    learner = learner_of()
    learner(pictures(4))
    learner.update_moving_average()
    learner.eval()
    before = states(learner)
    first, second = learner(pictures(4, seed=1)), learner(pictures(4, seed=1))
    learner(pictures(4), return_embedding=True)
    assert first == second
    assert len(same(states(learner), before)) == len(before)
    before_update = learner.center.clone()
    learner.update_moving_average()
    torch.testing.assert_close(learner.center, before_update, rtol=0, atol=0)


def test_asking_for_embeddings_while_training_changes_nothing() -> None:
    learner = learner_of().train()
    before = states(learner)
    first = learner(pictures(4), return_embedding=True, return_projection=False)
    torch.testing.assert_close(learner(pictures(4)[:1], return_embedding=True)[1], first[:1])
    assert not first.requires_grad
    assert len(same(states(learner), before)) == len(before)


def test_embeddings_are_the_teachers_of_normalised_images() -> None:
    learner = learner_of()
    one_step(learner, pictures(4), torch.optim.SGD(learner.parameters(), lr=0.5))
    images = pictures(3, seed=5)
    normalised = normalise(images, mean=torch.tensor(IMAGENET_MEAN), std=torch.tensor(IMAGENET_STD))
    embeddings = learner(images, return_embedding=True, return_projection=False)
    torch.testing.assert_close(embeddings, learner.teacher(normalised))
    floats = learner(images / 255, return_embedding=True, return_projection=False)
    torch.testing.assert_close(floats, embeddings)
    learner.eval()
    assert not torch.allclose(embeddings, learner.student(normalised))


def test_resetting_makes_the_teacher_a_copy_again() -> None:
    learner = learner_of()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    one_step(learner, pictures(4), optimizer)
    learner(pictures(4))
    learner.reset_moving_average()
    student = learner.student_network.state_dict()
    for name, tensor in learner.teacher_network.state_dict().items():
        torch.testing.assert_close(tensor, student[name], rtol=0, atol=0)
    assert learner.center.abs().max() == 0
    learner.update_moving_average()
    assert learner.center.abs().max() == 0


def test_a_saved_learner_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(learner: Dino, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
        return [one_step(learner, pictures(4, seed=seed), optimizer) for seed in seeds]

    whole = learner_of()
    whole_optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    run(whole, whole_optimizer, range(2))
    torch.save({"learner": whole.state_dict(), "optimizer": whole_optimizer.state_dict()}, tmp_path / "c.pt")
    resumed = learner_of(copy.deepcopy(conv_net()))
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(saved["learner"], strict=True)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    torch.testing.assert_close(resumed.center, whole.center, rtol=0, atol=0)
    assert run(resumed, resumed_optimizer, range(2, 4)) == run(whole, whole_optimizer, range(2, 4))
    assert len(same(states(resumed), states(whole))) == len(states(whole))


def test_each_call_draws_anew_and_a_seed_draws_again() -> None:
    images = pictures(4)
    first, again, other = learner_of(), learner_of(), learner_of(seed=1)
    losses = [first(images).item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert [again(images).item() for _ in range(2)] == losses
    assert other(images).item() != losses[0]


@pytest.mark.parametrize(
    ("net", "layer", "dimensions"),
    [
        pytest.param(torchvision.models.resnet18(), -2, 512, id="torchvision, by index"),
        pytest.param(torchvision.models.resnet18(), "avgpool", 512, id="torchvision, by name"),
        pytest.param(torchvision.models.resnet18(), "layer2", 128, id="a layer of maps"),
        pytest.param(timm.create_model("test_resnet"), -2, 96, id="timm, by index"),
        pytest.param(LatentViT(), "to_latent", 24, id="a ViT, by name"),
        pytest.param(LatentViT(), "transformer", 24, id="a layer of tokens"),
    ],
)
def test_nets_of_many_kinds_can_be_trained(net: nn.Module, layer: str | int, dimensions: int) -> None:
    learner = learner_of(net, hidden_layer=layer)
    assert torch.isfinite(
        torch.tensor(one_step(learner, pictures(2), torch.optim.AdamW(learner.parameters())))
    )
    assert learner(pictures(2), return_embedding=True, return_projection=False).shape == (2, dimensions)
    assert learner.student is not learner.teacher


def test_a_backbone_of_ours_needs_no_layer() -> None:
    backbone = make_backbone(
        "vit_tiny_patch16_224", image_size_px=32, model_kwargs={"patch_size": 8, "depth": 1}
    )
    learner = learner_of(backbone)
    assert learner.student is backbone
    assert learner(pictures(2)).isfinite()


def test_a_vit_that_only_knows_its_size_learns_from_smaller_crops_with_right_positions() -> None:
    learner = learner_of(LatentViT(), hidden_layer="to_latent")
    assert isinstance(learner.student, ResampledPositions)
    assert isinstance(learner.teacher, ResampledPositions)
    assert not isinstance(
        learner_of(LatentViT(), hidden_layer="to_latent", local_size=32).student, ResampledPositions
    )


def test_a_net_that_cannot_take_local_crops_is_refused_when_the_learner_is_made() -> None:
    net: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, patch_size=8)
    with pytest.raises(BackboneError, match="give local_size=32"):
        learner_of(net, hidden_layer="norm")
    assert learner_of(net, hidden_layer="norm", local_crops=0)(pictures(2)).isfinite()


def test_making_a_learner_leaves_the_net_as_it_was() -> None:
    net = conv_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    learner = learner_of(net)
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert learner.center.abs().max() == 0


@pytest.mark.parametrize(
    ("image_size_px", "expected_px"),
    [(224, 96), (256, 96), (128, 64), (64, 32), (32, 16), (28, 12), (7, 3), (1, 1)],
)
def test_local_crops_are_three_sevenths_in_whole_patches(image_size_px: int, expected_px: int) -> None:
    assert default_local_px(image_size_px) == expected_px


def test_views_are_the_papers() -> None:
    views = Dino(conv_net(), 224, **SMALL).views
    assert [view.size_px for view in views] == [224, 224] + [96] * 8
    assert [view.area for view in views] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 8
    assert [view.blur_probability for view in views] == [1.0, 0.1] + [0.5] * 8
    assert {view.blur_sigma_px for view in views} == {(0.1, 2.0)}
    assert {view.blur_sigma_px for view in Dino(conv_net(), 112, **SMALL).views} == {(0.1, 1.0)}


def test_own_augmentations_see_one_image_at_a_time_by_turns() -> None:
    calls: list[tuple[int, tuple[int, ...], float]] = []

    def recording(which: int) -> Callable[[Tensor], Tensor]:
        def augmentation(images: Tensor) -> Tensor:
            calls.append((which, tuple(images.shape), images.max().item()))
            return images * 0 + which

        return augmentation

    learner = learner_of(augment_fn=recording(1), augment_fn2=recording(2), local_crops=3)
    seen: list[Tensor] = []
    learner.student_network.register_forward_pre_hook(lambda _module, args: seen.extend(args[0]))
    learner(pictures(2))
    assert [which for which, _, _ in calls] == [1, 1, 2, 2, 1, 1, 2, 2, 1, 1]
    assert {shape for _, shape, _ in calls} == {(1, 3, 32, 32), (1, 3, 16, 16)}
    assert all(0 < largest <= 1 for _, _, largest in calls)
    assert [view.unique().item() for view in seen] == [1, 2, 1, 2, 1]  # type: ignore[no-untyped-call]
    # Nothing is normalised behind their back, for embeddings either.
    images = pictures(2) / 255
    torch.testing.assert_close(
        learner(images, return_embedding=True, return_projection=False), learner.teacher(images)
    )


def test_one_augmentation_serves_all_crops_and_torchvisions_draw_for_each_image() -> None:
    learner = learner_of(augment_fn=v2.RandomInvert(p=0.5), local_crops=6)
    seen: list[Tensor] = []
    learner.student_network.register_forward_pre_hook(lambda _module, args: seen.extend(args[0]))
    learner(torch.zeros(8, 3, 40, 40))
    inverted = torch.stack([view.mean(dim=(1, 2, 3)).round() for view in seen])
    assert all(0 < row.sum() < 8 for row in inverted[:2])
    assert 0 < inverted.mean() < 1


def test_a_second_augmentation_without_a_first_is_refused() -> None:
    with pytest.raises(ValueError, match="give both"):
        learner_of(augment_fn2=lambda images: images)


@pytest.mark.parametrize("images", [torch.randn(4, 3, 40, 40), 255 * torch.rand(4, 3, 40, 40)])
def test_images_that_are_normalised_already_are_warned_of_once(images: Tensor) -> None:
    learner = learner_of()
    with pytest.warns(UserWarning, match="expected uint8 or float from 0 to 1"):
        learner(images)
    learner(images)  # warnings are errors here, so a second one would fail


def test_images_of_other_channels_can_be_learnt_from() -> None:
    net = nn.Sequential(nn.Conv2d(5, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity())
    learner = learner_of(net, in_channels=5, mean=[0.5] * 5, std=[0.25] * 5)
    images = torch.rand(2, 5, 40, 40)
    assert learner(images).isfinite()
    torch.testing.assert_close(
        learner(images, return_embedding=True)[1], learner.teacher((images - 0.5) / 0.25)
    )


def test_bfloat16_gives_the_loss_in_float32_close_to_the_full_one() -> None:
    learner = learner_of().eval()
    images = pictures(4)
    exact = learner(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = learner(images)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_replicas_on_several_devices_share_one_centre_and_draw_apart() -> None:
    learner = learner_of()
    seen: list[Tensor] = []
    # As nn.DataParallel makes them: a shallow copy a device. Here both are on the CPU, one after the other.
    replicas = [copy.copy(learner) for _ in range(2)]
    for replica in replicas:
        replica.__dict__["_is_replica"] = True
    learner.student_network.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    for replica in replicas:
        replica(pictures(2))
    assert not torch.equal(seen[0], seen[1])
    learner.update_moving_average()
    assert learner.center.abs().max() > 0
    before = learner.center.clone()
    learner.update_moving_average()
    torch.testing.assert_close(learner.center, before, rtol=0, atol=0)


def test_a_replicas_draws_are_not_those_of_the_learner_itself() -> None:
    first_views = []
    for is_replica in (False, True):
        learner = learner_of()
        learner.__dict__["_is_replica"] = is_replica
        learner.student_network.register_forward_pre_hook(lambda _m, args: first_views.append(args[0][0]))
        learner(pictures(2))
    assert not torch.equal(first_views[0], first_views[1])


def test_the_teachers_targets_are_normalised_by_the_batch() -> None:
    learner = learner_of()
    normed: list[Tensor] = []
    norm = learner.teacher.get_submodule("net.1")
    norm.register_forward_hook(lambda _module, _args, output: normed.append(output))
    learner(pictures(8))
    torch.testing.assert_close(normed[0].mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    learner(pictures(8), return_embedding=True)
    assert normed[1].mean(dim=(0, 2, 3)).abs().max() > 1e-2


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_classifier_behind_the_embedding_doesnt_stop_distributed_training() -> None:
    learner = learner_of()
    wrapped = DistributedDataParallel(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    for seed in range(3):  # a parameter without gradient raises in the second forward
        loss = wrapped(pictures(4, seed=seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.update_moving_average()
    assert torch.isfinite(loss)


def test_the_teacher_becomes_a_bundle(tmp_path: Path) -> None:
    net: Any = timm.create_model("test_resnet")
    learner = learner_of(net)
    one_step(learner, pictures(4), torch.optim.AdamW(learner.parameters(), lr=1e-2))
    manifest = learner.export(tmp_path / "mine")
    assert (manifest.id, manifest.architecture) == ("mine", "test_resnet")
    assert (manifest.preprocessing.crop_px, manifest.preprocessing.mean) == (32, IMAGENET_MEAN)
    images = pictures(3, side_px=32)
    embeddings = learner(images, return_embedding=True, return_projection=False)
    served = load_bundle(tmp_path / "mine").model(images)
    torch.testing.assert_close(served, functional.normalize(embeddings, dim=1), rtol=1e-4, atol=1e-5)


def test_a_torchvision_net_and_a_backbone_of_ours_become_bundles_too(tmp_path: Path) -> None:
    images = pictures(2, side_px=32)
    vit = make_backbone("vit_tiny_patch16_224", image_size_px=32, model_kwargs={"patch_size": 8, "depth": 1})
    own_vit: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, dynamic_img_size=True
    )
    for name, learner, arguments in (
        ("resnet", learner_of(torchvision.models.resnet18()), {"architecture": "resnet18"}),
        ("ours", learner_of(vit), {}),
        (
            "timm",
            learner_of(own_vit, hidden_layer="norm", tokens="first"),
            {"model_kwargs": {"patch_size": 8, "depth": 1}},
        ),
    ):
        learner.export(tmp_path / name, **arguments)
        embeddings = learner(images, return_embedding=True, return_projection=False)
        served = load_bundle(tmp_path / name).model(images)
        torch.testing.assert_close(served, functional.normalize(embeddings, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        pytest.param(-2, {}, "give architecture=", id="a net that has no timm name"),
        pytest.param(
            -2, {"architecture": "resnet34"}, "not those of timm's resnet34", id="another net's name"
        ),
        pytest.param(-2, {"architecture": "resnet81"}, "no model", id="no net's name"),
        pytest.param("layer2", {"architecture": "resnet18"}, "gives other embeddings", id="another layer"),
        pytest.param(
            "layer4.1.bn2", {"architecture": "resnet18"}, "gives other embeddings", id="before the last relu"
        ),
    ],
)
def test_a_teacher_that_timm_cannot_be_is_refused(
    tmp_path: Path, layer: str | int, arguments: dict[str, str], message: str
) -> None:
    learner = learner_of(torchvision.models.resnet18(), hidden_layer=layer)
    with pytest.raises(BundleError, match=message):
        learner.export(tmp_path / "mine", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "mine").exists()


def textures(count: int, *, seed: int, side_px: int = 40) -> tuple[Tensor, Tensor]:
    """Grey textures of eight kinds; scale, place, brightness and contrast differ within a kind."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 8
    rows, columns = torch.meshgrid(torch.arange(side_px), torch.arange(side_px), indexing="ij")
    images = []
    for label in labels.tolist():
        scale, x, y, low, contrast = torch.rand(5, generator=generator).tolist()
        period_px = 6 + 3 * scale
        wave = 2 * torch.pi / period_px
        across, down = torch.sin(wave * columns + 6 * x), torch.sin(wave * rows + 6 * y)
        from_centre = torch.sqrt((columns - side_px * x) ** 2 + (rows - side_px * y) ** 2)
        pattern = [
            across,
            down,
            across * down,
            torch.maximum(across, down),
            torch.minimum(across, down),
            torch.sin(wave * from_centre),
            torch.sin(wave * columns / 3 + 6 * x),
            torch.randn(side_px, side_px, generator=generator),
        ][label]
        dark = 0.5 * low
        grey = dark + (0.2 + (0.8 - dark) * contrast) * (pattern > 0)
        images.append(grey + 0.1 * torch.randn(3, side_px, side_px, generator=generator))
    return (torch.stack(images).clamp(0, 1) * 255).to(torch.uint8), labels


def photographs(count: int, *, split: str, side_px: int = 40) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for label, folder in enumerate(sorted((SHARED / "data" / "imagenette" / split).iterdir())):
        for path in sorted(folder.iterdir())[: count // 10]:
            images.append(load_pixels(path.read_bytes(), Preprocessing(resize_px=side_px, crop_px=side_px)))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def accuracies(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], *, steps: int, local_crops: int
) -> tuple[float, float]:
    """k-NN accuracy of the teacher in percent, before and after some steps."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for width_in, width in ((3, 16), (16, 32), (32, 64)):
        blocks += [nn.Conv2d(width_in, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    learner = Dino(
        net,
        32,
        num_classes_K=128,
        projection_hidden_size=128,
        projection_batch_norm=True,
        moving_average_decay=0.99,
        teacher_temp=0.02,
        local_crops=local_crops,
    )

    def accuracy() -> float:
        embeddings = [
            functional.normalize(
                learner(images[..., 4:36, 4:36], return_embedding=True, return_projection=False), dim=1
            )
            for images, _ in (bank, queries)
        ]
        return knn_accuracy(embeddings[0], bank[1], embeddings[1], queries[1], k=10)[0]

    before = accuracy()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
        one_step(learner, bank[0][torch.randint(0, len(bank[0]), (32,), generator=generator)], optimizer)
    return before, accuracy()


def test_training_on_pictures_raises_the_neighbours_accuracy() -> None:
    before, after = accuracies(textures(480, seed=0), textures(240, seed=1), steps=150, local_crops=2)
    assert after >= before + 8  # 20 are usual; one standard error of 240 queries is 3


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "data" / "imagenette").is_dir(), reason="needs the photographs that DINO_SHARED names"
)
def test_training_on_photographs_raises_the_neighbours_accuracy() -> None:
    bank, queries = photographs(1500, split="train"), photographs(1000, split="val")
    before, after = accuracies(bank, queries, steps=150, local_crops=2)
    assert after >= before + 1  # one seed gained 4; one standard error of 1,000 queries is 1.4
