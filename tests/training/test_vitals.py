"""Distance and gradient norms by part: against the plain formulas, and without a trace in the step."""

from typing import Any

import pytest
import torch

from tests.training.conftest import MakeConfig
from training.state import TrainState, new_state
from training.step import train_step
from training.vitals import distance, gradient_norms

CPU = torch.device("cpu")
RESNET: dict[str, Any] = {"backbone": {"name": "test_resnet", "image_size_px": 32, "model_kwargs": {}}}


def views(side: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, size, size, generator=generator) for size in (side, side, side // 2)]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def moved(state: TrainState) -> None:
    with torch.no_grad():
        for parameter in state.student.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01
            )


def test_the_distance_is_that_of_all_weights_in_one_vector(make_config: MakeConfig) -> None:
    state = new_state(make_config(), device=CPU)
    assert float(distance(state.student, state.teacher)) == 0.0
    moved(state)
    student, teacher = (flat(list(network.parameters())) for network in (state.student, state.teacher))
    expected = (student - teacher).norm() / teacher.norm()
    torch.testing.assert_close(distance(state.student, state.teacher), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "stem"),
    [
        pytest.param({}, ("patch_embed.", "cls_token", "pos_embed"), id="ViT"),
        pytest.param(RESNET, ("conv1.", "bn1."), id="ResNet"),
    ],
)
def test_each_part_has_the_norm_of_its_gradients(
    make_config: MakeConfig, changes: dict[str, Any], stem: tuple[str, ...]
) -> None:
    state = new_state(make_config(**changes), device=CPU)
    state.student(views()).square().sum().backward()
    named = {
        name: parameter.grad
        for name, parameter in state.student.named_parameters()
        if parameter.grad is not None
    }
    backbone = {
        name.removeprefix("backbone.network."): gradient
        for name, gradient in named.items()
        if name.startswith("backbone.")
    }
    expected = [
        [gradient for name, gradient in backbone.items() if name.startswith(stem)],
        [gradient for name, gradient in backbone.items() if not name.startswith(stem)],
        [gradient for name, gradient in named.items() if name.startswith("head.") and "last" not in name],
        [gradient for name, gradient in named.items() if name.startswith("head.last_layer.")],
    ]
    assert all(expected)
    torch.testing.assert_close(
        gradient_norms(state.student), torch.stack([flat(part).norm() for part in expected])
    )


def test_looking_closely_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config(optimizer={"clip_norm": 0.01})
    plain, watched = new_state(config, device=CPU), new_state(config, device=CPU)
    for step in range(3):
        one = train_step(plain, [views(16)], config=config)
        two = train_step(watched, [views(16)], config=config, closely=True)
        assert one.vitals is None
        assert two.vitals is not None
        assert one.loss_nats == two.loss_nats
        assert (two.vitals.teacher_student_distance > 0) == (step > 0)  # the warm-up begins with a rate of 0
        by_part = [
            two.vitals.gradient_norm_stem,
            two.vitals.gradient_norm_blocks,
            two.vitals.gradient_norm_head,
            two.vitals.gradient_norm_last_layer,
        ]
        # Before clipping, as the norm of all is: together they are it.
        assert torch.tensor(by_part).norm().item() == pytest.approx(two.gradient_norm, rel=1e-5)
    for name, tensor in plain.teacher.state_dict().items():
        assert torch.equal(watched.teacher.state_dict()[name], tensor), name
