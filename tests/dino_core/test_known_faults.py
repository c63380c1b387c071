"""Faults that other implementations of DINO have or had: one test for each, which would have caught it.

B1 to B21 are those of the small implementation whose call style `dino_core.learner` keeps. The rest are those
of larger ones. The fault, and not our feature, is what a docstring tells.
"""

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_core.augment import augment, dino_views
from dino_core.backbones import make_backbone, wrap_module
from dino_core.errors import BackboneError
from dino_core.heads import ProjectionHead
from dino_core.knn import knn_accuracy
from dino_core.learner import Dino
from dino_core.learner_views import default_local_px
from dino_core.losses import dino_loss, sharpen, teacher_logits_sum, updated_center
from dino_core.multicrop import ProjectedNetwork, forward_views
from dino_core.optim import clip_gradients, weight_decay_groups
from dino_core.schedules import cosine, linear_warmup
from dino_core.teacher import batch_statistics, make_teacher, update_teacher
from tests.references.vit import LatentViT


class Counting(nn.Module):
    """Embeds by channel means and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.batches: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(tuple(images.shape))
        return images.mean(dim=(2, 3)) * self.scale


def conv_net(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def learner_of(net: nn.Module | None = None, **changes: object) -> Dino:
    settings: dict[str, Any] = {
        "hidden_layer": -2,
        "num_classes_K": 16,
        "projection_hidden_size": 8,
        "local_crops": 2,
        **changes,
    }
    return Dino(net or conv_net(), 32, **settings)


def pictures(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)


def views_of(images: Tensor, **changes: Any) -> list[Tensor]:  # noqa: ANN401  any field of dino_views
    return augment(
        images,
        sizes_px_B2=None,
        views=dino_views(**{"global_px": 32, "local_px": 16, **changes}),
        seed=0,
        epoch=0,
        indices_B=torch.arange(len(images)),
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )


def default(name: str) -> object:
    return inspect.signature(Dino).parameters[name].default


def test_the_student_sees_all_crops_and_the_loss_has_all_pairs_of_different_ones() -> None:
    """B1: the student saw two local crops only, and the loss had 2 terms in place of 18."""
    learner = learner_of(local_crops=8)
    seen: dict[str, int] = {}
    for name, network in (("student", learner.student_network), ("teacher", learner.teacher_network)):
        network.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, len(args[0])))
    learner(pictures(2))
    assert seen == {"student": 10, "teacher": 2}
    # The two teacher views weigh 1 and 2, so that the sum tells how many pairs each is in.
    weights = torch.zeros(2, 1, 4)
    weights[0], weights[1] = 1 / 4, 2 / 4
    pairs_nats = dino_loss(torch.zeros(10, 1, 4), weights, student_temperature=0.1) * 18
    assert pairs_nats.item() == pytest.approx(9 * math.log(4) + 9 * 2 * math.log(4), rel=1e-6)


def test_local_crops_are_smaller_than_global_ones() -> None:
    """B2: local crops had the full size, which saves nothing and shows no other scale."""
    assert default_local_px(224) == 96
    assert [view.size_px for view in Dino(conv_net(), 224, num_classes_K=4).views] == [224] * 2 + [96] * 8
    learner = learner_of()
    sizes: list[int] = []
    learner.student.register_forward_pre_hook(lambda _m, args: sizes.append(args[0].shape[-1]))
    learner(pictures(2))
    assert sizes == [32, 16]


def test_each_image_and_each_crop_has_its_own_draw() -> None:
    """B3: one set of draws served the whole batch."""
    twins = pictures(1).expand(8, -1, -1, -1)
    for view in views_of(twins):
        assert len({tuple(image.flatten()[:50].tolist()) for image in view}) == 8
    local_views = torch.stack(views_of(twins)[2:])
    assert len({tuple(view.flatten()[:50].tolist()) for view in local_views}) == 8


def test_a_blur_is_as_strong_in_a_small_crop_as_in_a_large_one() -> None:
    """B4: colours and blur came before the crop, alike for all crops, and the crop zoomed the blur."""
    half = torch.zeros(16, 3, 64, 64)
    half[..., 32:] = 1
    widths = []
    for area in ((0.9, 1.0), (0.05, 0.1)):
        view = copy.deepcopy(dino_views(global_px=64, global_area=area)[0])
        blurred = augment(
            half,
            sizes_px_B2=None,
            views=[view],
            seed=0,
            epoch=0,
            indices_B=torch.arange(16),
            mean=[0.0] * 3,
            std=[1.0] * 3,
        )[0]
        span = blurred.amax(dim=(1, 2, 3)) - blurred.amin(dim=(1, 2, 3))
        steepest = blurred.diff(dim=3).abs().amax(dim=(1, 2, 3))
        crossed = span > 0.1  # crops that show the edge
        widths.append((span[crossed] / steepest[crossed]).median().item())
    # Blurred after the crop, an edge is some pixels wide at most; zoomed by 4, the same blur would be 4 times
    # that.
    assert max(widths) < 8
    colours = torch.stack([view.mean(dim=(2, 3)) for view in views_of(torch.full((4, 3, 40, 40), 0.5))])
    assert len({tuple(row.tolist()) for row in colours[:, 0]}) > 5


def test_the_student_is_ten_times_sharper_than_uniform() -> None:
    """B5: the student's temperature was 0.9, which leaves hardly a gradient."""
    assert default("student_temp") == 0.1
    head = ProjectionHead(4, 1000, hidden_dim=8, bottleneck_dim=4)
    logits = head(torch.randn(64, 4))
    spread_nats = [(logits / t).amax(dim=1).sub((logits / t).mean(dim=1)).mean().item() for t in (0.1, 0.9)]
    assert spread_nats[0] > 5
    assert spread_nats[1] < 1.2  # cosines reach 1, so a logit reaches 10 at 0.1


def test_the_teachers_temperature_can_follow_a_schedule() -> None:
    """B6: the teacher's temperature was constant."""
    epochs = [linear_warmup(epoch, start=0.04, end=0.07, warmup_steps=30) for epoch in (0, 29, 99)]
    assert epochs == pytest.approx([0.04, 0.07, 0.07])
    learner = learner_of().eval()
    assert learner(pictures(2), teacher_temp=epochs[0]) != learner(pictures(2), teacher_temp=epochs[1])


def test_the_teacher_averages_hundreds_of_steps() -> None:
    """B7: the teacher's momentum was 0.9, a misreading of the ablation of the centre's."""
    assert default("moving_average_decay") == 0.996
    assert default("center_moving_average_decay") == 0.9
    assert [cosine(step, start=0.996, end=1.0, total_steps=100) for step in (0, 100)] == [0.996, 1.0]


def test_the_bottleneck_has_no_activation() -> None:
    """B8: the last layer of the MLP had a GELU, as `is_last` was never true."""
    for layers in (2, 3, 4):
        head = ProjectionHead(4, 8, hidden_dim=16, bottleneck_dim=6, num_layers=layers)
        activations = [type(module) for module in head.mlp.modules()]
        assert activations.count(nn.GELU) == layers - 1
        assert activations[-1] is nn.Linear
        bottleneck = head.mlp(torch.randn(100, 4))
        assert bottleneck.min() < -0.5 * bottleneck.max()  # a GELU gives nothing below -0.17


def test_prototypes_are_directions_without_bias() -> None:
    """B9: the last layer was a plain Linear with a bias, on a bottleneck that was not narrow."""
    head = ProjectionHead(4, 8, hidden_dim=16, bottleneck_dim=6)
    assert {name for name, _ in head.last_layer.named_parameters()} == {"weight_g", "weight_v"}
    assert not head.last_layer.weight_g.requires_grad
    assert head(100 * torch.randn(50, 4)).abs().max() <= 1 + 1e-6
    assert ProjectionHead(384, 8).last_layer.weight_v.shape == (8, 256)


def test_the_head_starts_from_small_normal_weights() -> None:
    """B10: the head had torch's default initialisation."""
    layers = [layer for layer in ProjectionHead(384, 8).mlp.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.bias.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_a_hopeless_student_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    """B11: `log(softmax(x) + 1e-20)` is -inf in float16, where 1e-20 is 0."""
    student = torch.full((2, 1, 8), -40.0)
    student[..., 0] = 40
    targets = sharpen(-student, torch.zeros(8), temperature=0.04)
    student = student.to(dtype).requires_grad_()
    loss = dino_loss(student, targets, student_temperature=0.1)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(800, rel=1e-3)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_centre_counts_all_micro_batches() -> None:
    """B12: the centre moved to the last micro-batch of an accumulation, and each process had its own."""
    learner = learner_of()
    outputs: list[Tensor] = []
    learner.teacher_network.register_forward_hook(lambda _m, _args, output: outputs.append(output))
    for seed, count in enumerate((4, 2)):
        learner(pictures(count, seed=seed))
    learner.update_moving_average()
    sums, counts = zip(*map(teacher_logits_sum, outputs), strict=True)
    expected = updated_center(torch.zeros(16), sums[0] + sums[1], counts[0] + counts[1], momentum=0.9)
    torch.testing.assert_close(learner.center, expected)
    only_last = updated_center(torch.zeros(16), sums[1], counts[1], momentum=0.9)
    assert not torch.allclose(learner.center, only_last)


def test_the_teacher_drops_nothing_and_has_the_students_statistics() -> None:
    """B13: the teacher stayed in training mode, dropout included, and its BatchNorm buffers never moved."""
    learner = learner_of(conv_net(dropout=0.5)).train()
    assert not any(module.training for module in learner.teacher_network.modules())
    images = torch.randn(4, 3, 32, 32)
    with batch_statistics(learner.teacher_network):
        torch.testing.assert_close(learner.teacher(images), learner.teacher(images), rtol=0, atol=0)
    learner(pictures(4))
    learner.update_moving_average()
    student = dict(learner.student_network.named_buffers())
    assert student["backbone.net.1.num_batches_tracked"] == 2  # one a size of crop
    for name, buffer in learner.teacher_network.named_buffers():
        torch.testing.assert_close(buffer, student[name], rtol=0, atol=0)


def test_the_teacher_is_updated_in_place() -> None:
    """B14: each update gave the teacher's parameters new storage."""
    learner = learner_of()
    before = [parameter.data_ptr() for parameter in learner.teacher_network.parameters()]
    learner.update_moving_average()
    assert [parameter.data_ptr() for parameter in learner.teacher_network.parameters()] == before


def test_a_learner_is_whole_when_made_and_leaves_no_trace_in_the_net() -> None:
    """B15: a forward on noise, when it was made, built its modules and moved statistics and centre."""
    net = conv_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    wrap_module(net, layer=-2, image_size_px=32)
    assert torch.equal(torch.get_rng_state(), random_state)
    learner = learner_of(net)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert learner.center.abs().max() == 0
    names = {name for name, _ in learner.named_parameters()}
    learner(pictures(2))
    learner.update_moving_average()
    assert {name for name, _ in learner.named_parameters()} == names
    five_channels = nn.Sequential(nn.Conv2d(5, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Identity())
    assert learner_of(five_channels, in_channels=5)(torch.rand(2, 5, 40, 40)).isfinite()


def test_layers_behind_the_embedding_never_run_and_tokens_are_pooled() -> None:
    """B16: the classifier ran without getting a gradient, and tokens were flattened to one long vector."""
    net = LatentViT()
    ran: list[str] = []
    net.mlp_head.register_forward_hook(lambda *_: ran.append("classifier"))
    assert wrap_module(net, layer="to_latent", image_size_px=32)(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert wrap_module(net, layer="transformer", image_size_px=32)(torch.randn(2, 3, 32, 32)).shape == (2, 24)
    assert ran == []
    ignored = learner_of(net, hidden_layer="to_latent")._ddp_params_and_buffers_to_ignore
    assert ignored == [
        f"student_network.backbone.backbone.net.mlp_head.{name}" for name in ("weight", "bias")
    ]


def test_a_layer_that_never_runs_is_named() -> None:
    """B17: a net without a head never reached the hooked layer, and the user saw a KeyError."""

    class Headless(LatentViT):
        def forward(self, images: Tensor) -> Tensor:
            tokens: Tensor = self.transformer(self.to_patches(images).flatten(2).movedim(1, 2))
            return tokens.mean(dim=1)

    with pytest.raises(BackboneError, match="'to_latent' did not run in Headless.forward"):
        learner_of(Headless(), hidden_layer="to_latent")


def test_smaller_crops_get_their_own_positions() -> None:
    """B18: the table of positions was cut off, so a small crop's rows had the positions of one long row."""
    torch.manual_seed(0)
    net = LatentViT().eval()
    learner = learner_of(net, hidden_layer="to_latent")
    with torch.no_grad():
        net.to_patches.weight.zero_()
        net.to_patches.bias.zero_()  # type: ignore[union-attr]
        # Positions that only tell the column: a 2 x 2 crop must see both halves, a cut table sees the left
        # one twice...
        columns = torch.arange(16) % 4
        net.pos_embedding[0, 1:] = columns[:, None].float()
    images = torch.zeros(1, 3, 16, 16)
    seen: list[Tensor] = []
    net.transformer.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, 1:, 0]))
    learner.student(images)
    assert seen[-1].tolist() == pytest.approx([0.5, 2.5, 0.5, 2.5], abs=0.5)
    own = make_backbone("vit_tiny_patch16_224", image_size_px=32, model_kwargs={"patch_size": 8, "depth": 1})
    assert own(torch.randn(1, 3, 16, 16)).shape == (1, 192)


def test_embeddings_and_exports_are_the_teachers() -> None:
    """B19: embeddings were the student's, and nothing gave the teacher."""
    learner = learner_of()
    with torch.no_grad():
        for parameter in learner.student_network.parameters():
            parameter.add_(torch.randn_like(parameter))
    learner.eval()
    embedding = learner(pictures(2), return_embedding=True, return_projection=False)
    assert learner.teacher is learner.teacher_network.backbone
    learner.reset_moving_average()
    assert not torch.allclose(learner(pictures(2), return_embedding=True, return_projection=False), embedding)


def test_an_optimiser_over_everything_holds_nothing_of_the_teacher() -> None:
    """B20: the optimiser was given the teacher's parameters too, and decayed biases and norms alike."""
    learner = learner_of()
    optimizer = torch.optim.AdamW(learner.parameters())
    torch.autograd.backward(learner(pictures(2)))
    optimizer.step()
    teachers = {id(parameter) for parameter in learner.teacher_network.parameters()}
    assert not any(id(parameter) in teachers for parameter in optimizer.state)
    decayed, kept = weight_decay_groups(learner)
    assert not any(id(parameter) in teachers for parameter in decayed["params"] + kept["params"])
    assert kept["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])


def test_there_are_65536_prototypes() -> None:
    """B21: 65336 prototypes, a slip of the pen that fits no published head."""
    assert default("num_classes_K") == 65536 == 2**16


def test_the_centre_is_saved_and_loaded() -> None:
    """stable-pretraining, vissl: the centre was a plain attribute, and lost when a run was resumed."""
    learner, resumed = learner_of(), learner_of()
    learner(pictures(2))
    learner.update_moving_average()
    assert learner.center.abs().max() > 0
    resumed.load_state_dict(learner.state_dict(), strict=True)
    torch.testing.assert_close(resumed.center, learner.center, rtol=0, atol=0)


def test_student_and_teacher_start_with_the_same_head() -> None:
    """lightly-train and lightly's benchmarks: two heads, initialised apart."""
    learner = learner_of()
    for name, tensor in learner.student_network.state_dict().items():
        torch.testing.assert_close(learner.teacher_network.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_teacher_that_lacks_a_layer_is_refused() -> None:
    """DINO, dinov2, dinov3, solo-learn: a plain zip over parameters leaves what has no partner unmoved."""
    longer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not the same network"):
        update_teacher(make_teacher(longer), nn.Sequential(nn.Linear(2, 2)), momentum=0.9)


def test_a_loss_moves_nothing() -> None:
    """lightly, solo-learn: the loss moved its own centre, so an evaluation changed the training."""
    student, teacher, center = torch.randn(3, 2, 8), torch.randn(2, 2, 8), torch.randn(8)
    before = center.clone()
    losses = [
        dino_loss(student, sharpen(teacher, center, temperature=0.04), student_temperature=0.1).item()
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert torch.equal(center, before)


def test_the_clip_of_the_official_code_and_that_of_torch_are_both_offered() -> None:
    """DINO: each parameter was clipped for itself, unsaid, where everybody else clips all together."""
    norms = {}
    for mode in ("global", "per_parameter"):
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
        for parameter in parameters:
            parameter.grad = torch.full((1,), 3.0)
        clip_gradients(parameters, max_norm=3.0, mode=mode)
        norms[mode] = math.sqrt(sum(float(p.grad.item()) ** 2 for p in parameters if p.grad is not None))
    assert norms == pytest.approx({"global": 3, "per_parameter": 6}, rel=1e-5)


def test_crops_are_grouped_by_height_and_width_wherever_they_stand() -> None:
    """DINO: only neighbours of one width were grouped, and a pair of one width and two heights failed."""
    net = Counting()
    views = [torch.randn(2, 3, *size) for size in ((8, 8), (4, 8), (8, 8))]
    outputs = forward_views(net, views)
    assert net.batches == [(4, 3, 8, 8), (2, 3, 4, 8)]
    torch.testing.assert_close(outputs[1], views[1].mean(dim=(2, 3)))


def test_a_prototypes_norm_that_learns_reaches_the_teacher() -> None:
    """DINO: with a learning norm only the student's head was built for it."""
    head = ProjectionHead(3, 8, hidden_dim=4, bottleneck_dim=2, norm_last_layer=False)
    student = ProjectedNetwork(Counting(), head)
    teacher = make_teacher(student)
    with torch.no_grad():
        head.last_layer.weight_g.fill_(2.0)
    update_teacher(teacher, student, momentum=0.5)
    torch.testing.assert_close(teacher.head.last_layer.weight_g, torch.full((8, 1), 1.5))


def test_a_handful_of_test_images_can_be_classified() -> None:
    """DINO: the k-NN evaluation broke below 100 images, as it had 100 chunks."""
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), k=1) == (100.0, 100.0)


def test_a_warmup_of_the_temperature_reaches_its_end_in_any_run() -> None:
    """lightly-train: the warm-up was counted in steps of a long run, and short ones never got far."""
    with pytest.raises(ValueError, match="outside the schedule"):
        cosine(101, start=0.04, end=0.07, total_steps=100)
    assert linear_warmup(30, start=0.04, end=0.07, warmup_steps=30) == 0.07
