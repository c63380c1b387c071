"""The teacher starts as a copy, follows by its momentum, and never silently in part."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dino_core.teacher import batch_statistics, make_teacher, update_teacher
from tests.references import dino_loop


def network(seed: int = 0, *, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 2))
    layers(torch.randn(16, 3))  # so that BatchNorm has seen something
    return layers


def test_the_teacher_starts_as_a_copy_that_takes_no_gradient() -> None:
    student = network().train()
    teacher = make_teacher(student)
    assert all(not parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.training
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], tensor, rtol=0, atol=0)
        assert teacher.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_the_teacher_drops_no_units_and_leaves_its_statistics_alone() -> None:
    teacher = make_teacher(network().train())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    inputs = torch.randn(8, 3)
    torch.testing.assert_close(teacher(inputs), teacher(inputs), rtol=0, atol=0)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@given(momentum=st.floats(0, 1), seed=st.integers(0, 99))
def test_one_update_equals_the_literal_loop(momentum: float, seed: int) -> None:
    teacher, student = make_teacher(network(seed)), network(seed + 100)
    literal = make_teacher(network(seed))
    update_teacher(teacher, student, momentum=momentum)
    dino_loop.update_teacher(literal, student, momentum=momentum)
    for name, tensor in literal.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], tensor)


def test_after_n_updates_the_distance_has_shrunk_by_momentum_to_the_n() -> None:
    student = network(1).double()
    teacher = make_teacher(network(0).double())
    start = [parameter.clone() for parameter in teacher.parameters()]
    for _ in range(20):
        update_teacher(teacher, student, momentum=0.9)
    for now, begun, goal in zip(teacher.parameters(), start, student.parameters(), strict=True):
        torch.testing.assert_close(now, goal + 0.9**20 * (begun - goal))


def test_momentum_one_stays_and_momentum_zero_copies() -> None:
    teacher, student = make_teacher(network(0)), network(1)
    before = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, student, momentum=1.0)
    for now, begun in zip(teacher.parameters(), before, strict=True):
        torch.testing.assert_close(now, begun, rtol=0, atol=0)
    update_teacher(teacher, student, momentum=0.0)
    for now, goal in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(now, goal, rtol=0, atol=0)


def test_buffers_are_copied_not_averaged() -> None:
    teacher, student = make_teacher(network(0)), network(1)
    for _ in range(3):
        student(torch.randn(16, 3))
    update_teacher(teacher, student, momentum=0.99)
    for (name, now), (_, goal) in zip(teacher.named_buffers(), student.named_buffers(), strict=True):
        torch.testing.assert_close(now, goal, rtol=0, atol=0, msg=name)


def test_the_teachers_storage_stays_where_it_is() -> None:
    teacher, student = make_teacher(network(0)), network(1)
    places = [tensor.data_ptr() for tensor in teacher.state_dict().values()]
    update_teacher(teacher, student, momentum=0.9)
    assert [tensor.data_ptr() for tensor in teacher.state_dict().values()] == places


def test_the_student_is_not_changed() -> None:
    teacher, student = make_teacher(network(0)), network(1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    update_teacher(teacher, student, momentum=0.5)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_network_without_buffers_and_one_without_parameters_can_be_followed() -> None:
    update_teacher(make_teacher(nn.Linear(2, 2)), nn.Linear(2, 2), momentum=0.9)
    update_teacher(
        make_teacher(nn.BatchNorm1d(2, affine=False)), nn.BatchNorm1d(2, affine=False), momentum=0.9
    )


@pytest.mark.parametrize(
    ("student", "message"),
    [
        pytest.param(nn.Sequential(nn.Linear(3, 4)), r"only in the teacher", id="a student of fewer layers"),
        pytest.param(nn.ModuleDict({"module": network()}), r"only in the student", id="a wrapped student"),
        pytest.param(network(width=5), r"shape \(4, 3\) in the teacher and \(5, 3\)", id="another width"),
    ],
)
def test_another_network_is_refused_and_nothing_is_changed(student: nn.Module, message: str) -> None:
    teacher = make_teacher(network())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        update_teacher(teacher, student, momentum=0.9)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_buffer_that_the_student_lacks_is_refused() -> None:
    student = network()
    del student[1]._buffers["running_mean"]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"buffers \['1.running_mean'\] are only in the teacher"):
        update_teacher(make_teacher(network()), student, momentum=0.9)


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_outside_zero_to_one_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        update_teacher(make_teacher(network()), network(), momentum=momentum)


def test_targets_are_normalised_by_the_batch_and_statistics_stay() -> None:
    teacher = make_teacher(network().train())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    inputs = 5 + 3 * torch.randn(64, 3)
    normed: list[torch.Tensor] = []
    teacher[1].register_forward_hook(lambda _module, _args, output: normed.append(output))  # type: ignore[index]
    with batch_statistics(teacher):
        first, second = teacher(inputs), teacher(inputs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # dropout is off
    torch.testing.assert_close(normed[0].mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed[0].std(dim=0, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert not torch.allclose(teacher(inputs), first)
    assert not any(module.training for module in teacher.modules())
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_failing_forward_leaves_the_teacher_in_evaluation_mode() -> None:
    teacher = make_teacher(network())
    with pytest.raises(RuntimeError), batch_statistics(teacher):
        teacher(torch.randn(8, 99))
    assert not any(module.training for module in teacher.modules())
    assert teacher[1].track_running_stats  # type: ignore[index]
