"""The loss against the paper's double loop, closed forms, invariances, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from dino_core.losses import (
    all_reduced,
    dino_loss,
    kl,
    sharpen,
    teacher_entropy,
    teacher_logits_sum,
    updated_center,
)
from tests.references import dino_loop


def logits(*shape: int, seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(
    student_views=st.integers(2, 5),
    teacher_views=st.integers(1, 3),
    images=st.integers(1, 3),
    prototypes=st.integers(2, 6),
    student_temperature=st.floats(0.05, 1.0),
    teacher_temperature=st.floats(0.02, 1.0),
    seed=st.integers(0, 2**16),
)
def test_dino_loss_equals_the_papers_double_loop(
    student_views: int,
    teacher_views: int,
    images: int,
    prototypes: int,
    student_temperature: float,
    teacher_temperature: float,
    seed: int,
) -> None:
    teacher_views = min(teacher_views, student_views)
    student = logits(student_views, images, prototypes, seed=seed)
    teacher = logits(teacher_views, images, prototypes, seed=seed + 1)
    center = logits(prototypes, seed=seed + 2)
    targets = sharpen(teacher, center, temperature=teacher_temperature)
    loss = dino_loss(student, targets, student_temperature=student_temperature)
    by_hand = dino_loop.loss_by_hand(
        student,
        teacher,
        center,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-7)  # float64: only the order of sums differs


@pytest.mark.parametrize("teacher_views", [1, 2, 3])
def test_the_gradient_equals_that_of_the_double_loop(teacher_views: int) -> None:
    student = logits(5, 4, 11).requires_grad_()
    literal_student = student.detach().clone().requires_grad_()
    targets = sharpen(logits(teacher_views, 4, 11, seed=1), torch.zeros(11), temperature=0.04)
    torch.autograd.backward(3 * dino_loss(student, targets, student_temperature=0.1))
    torch.autograd.backward(3 * dino_loop.dino_loss(literal_student, targets, student_temperature=0.1))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, literal_student.grad)


def test_the_gradient_equals_finite_differences() -> None:
    student = logits(4, 2, 5).requires_grad_()
    targets = sharpen(logits(2, 2, 5, seed=1), torch.zeros(5), temperature=0.5)
    assert torch.autograd.gradcheck(
        lambda tensor: dino_loss(tensor, targets, student_temperature=0.3), (student,)
    )


def test_targets_that_dont_sum_to_one_are_weighed_as_they_are() -> None:
    student = logits(3, 2, 5).requires_grad_()
    literal_student = student.detach().clone().requires_grad_()
    weights = logits(2, 2, 5, seed=1).abs()
    loss = dino_loss(student, weights, student_temperature=0.1)
    literal = dino_loop.dino_loss(literal_student, weights, student_temperature=0.1)
    torch.autograd.backward(loss)
    torch.autograd.backward(literal)
    torch.testing.assert_close(loss, literal)
    torch.testing.assert_close(student.grad, literal_student.grad)


def test_a_uniform_student_loses_log_k() -> None:
    targets = sharpen(logits(2, 3, 7), torch.zeros(7), temperature=0.04)
    loss = dino_loss(torch.zeros(4, 3, 7), targets, student_temperature=0.1)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)


def test_a_student_that_agrees_with_its_teacher_loses_the_teachers_entropy() -> None:
    scores_BK = logits(3, 7)
    targets = sharpen(torch.stack([scores_BK, scores_BK]), torch.zeros(7), temperature=0.2)
    loss = dino_loss(torch.stack([scores_BK] * 5), targets, student_temperature=0.2)
    torch.testing.assert_close(loss, teacher_entropy(targets))
    assert kl(loss, teacher_entropy(targets)).item() == pytest.approx(0, abs=1e-12)


def test_the_loss_is_entropy_plus_divergence() -> None:
    student, teacher = logits(4, 3, 6), logits(2, 3, 6, seed=1)
    targets = sharpen(teacher, torch.zeros(6), temperature=0.3)
    divergences = [
        torch.nn.functional.kl_div(
            torch.log_softmax(student[s] / 0.1, dim=-1), targets[t], reduction="batchmean"
        )
        for t in range(2)
        for s in range(4)
        if s != t
    ]
    loss = dino_loss(student, targets, student_temperature=0.1)
    torch.testing.assert_close(kl(loss, teacher_entropy(targets)), torch.stack(divergences).mean())


def test_entropy_is_zero_for_one_prototype_and_log_k_for_all() -> None:
    assert teacher_entropy(torch.eye(5)[None]).item() == 0
    assert teacher_entropy(torch.full((2, 3, 5), 0.2)).item() == pytest.approx(math.log(5), rel=1e-6)


def test_the_order_of_local_crops_and_of_images_doesnt_matter() -> None:
    student, teacher = logits(6, 4, 9), logits(2, 4, 9, seed=1)
    targets = sharpen(teacher, torch.zeros(9), temperature=0.04)
    loss = dino_loss(student, targets, student_temperature=0.1)
    views, images = [0, 1, 4, 2, 5, 3], [2, 0, 3, 1]
    shuffled = dino_loss(student[views][:, images], targets[:, images], student_temperature=0.1)
    torch.testing.assert_close(shuffled, loss)


def test_a_view_is_never_compared_with_its_own_target() -> None:
    student = logits(2, 3, 6).requires_grad_()
    targets = sharpen(logits(2, 3, 6, seed=1), torch.zeros(6), temperature=0.04)
    other = targets.clone()
    other[0] = targets[0].roll(1, dims=-1)  # only student view 1 meets teacher view 0
    gradients = []
    for probs in (targets, other):
        loss = dino_loss(student, probs, student_temperature=0.1)
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=0)
    assert not torch.allclose(gradients[0][1], gradients[1][1])


def test_no_gradient_flows_to_the_teacher() -> None:
    teacher = logits(2, 3, 6).requires_grad_()
    targets = sharpen(teacher, torch.zeros(6), temperature=0.04)
    assert not targets.requires_grad
    probs = torch.softmax(teacher, dim=-1)
    loss = dino_loss(logits(3, 3, 6, seed=1).requires_grad_(), probs, student_temperature=0.1)
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


def test_sharpen_takes_the_centre_away() -> None:
    teacher, center = logits(2, 3, 6), logits(6, seed=1)
    shifted = sharpen(teacher + center, center, temperature=0.04)
    torch.testing.assert_close(shifted, sharpen(teacher, torch.zeros(6), temperature=0.04))
    assert not torch.allclose(shifted, sharpen(teacher + center, torch.zeros(6), temperature=0.04))


def test_a_lower_temperature_is_sharper() -> None:
    entropies = [
        teacher_entropy(sharpen(logits(2, 3, 6), torch.zeros(6), temperature=temperature)).item()
        for temperature in (1.0, 0.3, 0.1, 0.03)
    ]
    assert entropies == sorted(entropies, reverse=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    student = logits(4, 3, 50, spread=5, dtype=torch.float32).to(dtype).requires_grad_()
    teacher = logits(2, 3, 50, seed=1, spread=5, dtype=torch.float32).to(dtype)
    exact_student = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = sharpen(teacher, torch.zeros(50), temperature=0.04)
        loss = dino_loss(student, targets, student_temperature=0.1)
    exact_targets = sharpen(teacher.float(), torch.zeros(50), temperature=0.04)
    exact = dino_loss(exact_student, exact_targets, student_temperature=0.1)
    torch.autograd.backward(loss)
    torch.autograd.backward(exact)
    assert targets.dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0, atol=0)
    assert student.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad, exact_student.grad.to(dtype))  # type: ignore[union-attr]


def test_huge_logits_give_a_finite_loss_and_gradient() -> None:
    student = logits(3, 2, 8, spread=1e4, dtype=torch.float32).requires_grad_()
    targets = sharpen(
        logits(2, 2, 8, seed=1, spread=1e4, dtype=torch.float32), torch.zeros(8), temperature=0.04
    )
    loss = dino_loss(student, targets, student_temperature=0.1)
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_only_the_logits_and_the_targets_are_kept_for_the_gradient() -> None:
    kept: list[int] = []
    student = logits(10, 4, 64, dtype=torch.float32).requires_grad_()
    targets = sharpen(logits(2, 4, 64, seed=1, dtype=torch.float32), torch.zeros(64), temperature=0.04)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dino_loss(student, targets, student_temperature=0.1)
    assert sum(kept) <= student.numel() + targets.numel()


def test_the_centre_moves_to_the_teachers_mean_by_its_momentum() -> None:
    teacher, center = logits(2, 3, 6), logits(6, seed=1)
    moved = updated_center(center, *teacher_logits_sum(teacher), momentum=0.9)
    torch.testing.assert_close(moved, dino_loop.updated_center(center, teacher, momentum=0.9))
    assert moved is not center


def test_sums_of_uneven_micro_batches_move_the_centre_as_the_whole_batch_does() -> None:
    teacher = logits(2, 7, 6)
    center = logits(6, seed=1)
    first, rest = teacher_logits_sum(teacher[:, :2]), teacher_logits_sum(teacher[:, 2:])
    accumulated = updated_center(center, first[0] + rest[0], first[1] + rest[1], momentum=0.9)
    torch.testing.assert_close(
        accumulated, updated_center(center, *teacher_logits_sum(teacher), momentum=0.9)
    )


def test_the_sum_of_half_precision_logits_is_in_float32() -> None:
    total, count = teacher_logits_sum(torch.full((2, 1000, 3), 1.0, dtype=torch.bfloat16, requires_grad=True))
    assert total.dtype == torch.float32
    assert total.tolist() == [2000.0] * 3  # bfloat16 stops counting at 256
    assert count.item() == 2000
    assert not total.requires_grad


def test_one_process_reduces_to_itself() -> None:
    total, count = teacher_logits_sum(logits(2, 3, 6))
    reduced_total, reduced_count = all_reduced(total, count)
    torch.testing.assert_close(reduced_total, total, rtol=0, atol=0)
    assert reduced_count == count


def reduce_in_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    teacher = logits(2, 5, 6)
    own = teacher[:, :2] if rank == 0 else teacher[:, 2:]
    center = updated_center(logits(6, seed=1), *all_reduced(*teacher_logits_sum(own)), momentum=0.9)
    torch.save(center, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_batches_share_one_centre(tmp_path: Path) -> None:
    spawn(reduce_in_process, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    expected = updated_center(logits(6, seed=1), *teacher_logits_sum(logits(2, 5, 6)), momentum=0.9)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_that_isnt_positive_is_refused(temperature: float) -> None:
    targets = sharpen(logits(2, 3, 6), torch.zeros(6), temperature=0.04)
    with pytest.raises(ValueError, match="teacher's temperature"):
        sharpen(logits(2, 3, 6), torch.zeros(6), temperature=temperature)
    with pytest.raises(ValueError, match="student's temperature"):
        dino_loss(logits(3, 3, 6), targets, student_temperature=temperature)


def test_a_centre_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="both must come from one head"):
        sharpen(logits(2, 3, 6), torch.zeros(1), temperature=0.04)


@pytest.mark.parametrize(
    ("student_views", "teacher_views"),
    [
        pytest.param(1, 1, id="one view has no partner"),
        pytest.param(2, 3, id="the teacher saw a view that the student didn't"),
    ],
)
def test_too_few_student_views_are_refused(student_views: int, teacher_views: int) -> None:
    with pytest.raises(ValueError, match="no pairs of different crops"):
        dino_loss(
            torch.zeros(student_views, 2, 5), torch.ones(teacher_views, 2, 5) / 5, student_temperature=0.1
        )


@pytest.mark.parametrize(
    "shape", [pytest.param((4, 3, 5), id="images"), pytest.param((4, 2, 6), id="prototypes"), (8, 5)]
)
def test_shapes_that_dont_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the last two alike"):
        dino_loss(torch.zeros(shape), torch.ones(2, 2, 5) / 5, student_temperature=0.1)
