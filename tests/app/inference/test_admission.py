import pytest

from app.errors import Overloaded, TooLarge
from app.inference.admission import Admission, Cost


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def admission(
    clock: Clock | None = None, *, images: int = 10, size: int = 1000, pixels: int = 1000
) -> Admission:
    return Admission(Cost(images, size, pixels), clock=clock or Clock())


@pytest.mark.parametrize(
    ("cost", "reason"),
    [
        pytest.param(Cost(6, 1, 1), "images", id="one image too many"),
        pytest.param(Cost(1, 501, 1), "bytes", id="one byte too many"),
        pytest.param(Cost(1, 1, 501), "pixels", id="one pixel too many"),
    ],
)
def test_a_budget_refuses_what_goes_over_it_and_keeps_what_it_held(cost: Cost, reason: str) -> None:
    held = Cost(5, 500, 500)
    budgets = admission()
    budgets.admit(held)
    with pytest.raises(Overloaded, match=reason) as refused:
        budgets.admit(cost)
    assert refused.value.reason == reason
    assert budgets.held == held


def test_a_request_that_just_fits_is_admitted() -> None:
    budgets = admission()
    budgets.admit(Cost(5, 500, 500))
    budgets.admit(Cost(5, 500, 500))
    assert budgets.held == Cost(10, 1000, 1000)


def test_what_is_released_is_there_for_others() -> None:
    budgets = admission()
    budgets.admit(Cost(10, 10, 10))
    budgets.release(Cost(1, 1, 1), served=False)
    budgets.admit(Cost(1, 991, 1))
    assert budgets.held == Cost(10, 1000, 10)


@pytest.mark.parametrize("cost", [Cost(11, 1, 1), Cost(1, 1001, 1), Cost(1, 1, 1001)])
def test_what_never_fits_is_too_large_however_idle_the_service_is(cost: Cost) -> None:
    with pytest.raises(TooLarge, match="split it") as refused:
        admission().admit(cost)
    assert refused.value.actual == refused.value.limit + 1


def served(budgets: Admission, clock: Clock, *, images: int, each_s: float) -> None:
    """Images that come back one after the other."""
    for _ in range(images):
        clock.now_s += each_s
        budgets.release(Cost(1), served=True)


def test_the_rate_is_that_of_busy_time() -> None:
    clock = Clock()
    budgets = admission(clock)
    assert budgets.images_per_s is None
    for _ in range(5):
        budgets.admit(Cost(10))
        served(budgets, clock, images=10, each_s=0.05)
        clock.now_s += 300  # idle
    assert budgets.images_per_s == pytest.approx(20, rel=0.01)


def test_the_rate_follows_a_service_that_becomes_slower() -> None:
    clock = Clock()
    budgets = admission(clock, images=1000)
    budgets.admit(Cost(1000))
    served(budgets, clock, images=500, each_s=0.01)
    served(budgets, clock, images=400, each_s=0.1)  # 40 s, four times the rate's memory
    assert budgets.images_per_s == pytest.approx(10, rel=0.1)


def test_dropped_work_does_not_count_as_speed() -> None:
    clock = Clock()
    budgets = admission(clock)
    budgets.admit(Cost(10))
    served(budgets, clock, images=1, each_s=1.0)
    for _ in range(9):
        budgets.release(Cost(1), served=False)
    assert budgets.images_per_s == pytest.approx(1)


def test_retry_after_is_the_time_in_which_room_for_the_request_is_made() -> None:
    clock = Clock()
    budgets = admission(clock)
    budgets.admit(Cost(10))
    served(budgets, clock, images=2, each_s=0.5)  # two images a second; 8 held
    with pytest.raises(Overloaded) as refused:
        budgets.admit(Cost(8))  # 6 of the 8 have to go
    assert refused.value.retry_after_s == pytest.approx(3.0)


def test_retry_after_is_a_guess_before_anything_was_measured() -> None:
    budgets = admission()
    budgets.admit(Cost(10))
    with pytest.raises(Overloaded) as refused:
        budgets.admit(Cost(1))
    assert refused.value.retry_after_s == 1.0


def test_a_request_that_would_miss_its_deadline_in_the_queue_is_refused_now() -> None:
    clock = Clock()
    budgets = admission(clock, images=100)
    budgets.admit(Cost(50))
    served(budgets, clock, images=10, each_s=0.1)  # 10 a second; 40 held: 4 s of waiting
    with pytest.raises(Overloaded, match=r"about 4\.1 s.*deadline is 6\.1 s") as refused:
        budgets.admit(Cost(1), deadline_s=6.1)
    assert refused.value.reason == "wait"
    # Half of what its own image leaves is for what the estimate doesn't know: 4 s have to become 3.
    assert refused.value.retry_after_s == pytest.approx(1.0)
    budgets.admit(Cost(1), deadline_s=8.2)


def test_a_request_whose_own_images_take_too_long_is_refused_and_taken_once_the_service_is_idle() -> None:
    clock = Clock()
    budgets = admission(clock, images=100)
    budgets.admit(Cost(20))
    served(budgets, clock, images=10, each_s=0.1)  # 10 a second; 10 held
    with pytest.raises(Overloaded) as refused:
        budgets.admit(Cost(50), deadline_s=2.0)
    assert refused.value.retry_after_s == pytest.approx(1.0)  # then nothing is before it
    served(budgets, clock, images=10, each_s=0.1)
    budgets.admit(Cost(50), deadline_s=2.0)


def lanes(clock: Clock | None = None) -> Admission:
    return Admission(Cost(10, 1000, 1000), bulk_capacity=Cost(5, 500, 500), clock=clock or Clock())


@pytest.mark.parametrize(
    ("cost", "reason"),
    [(Cost(3, 1, 1), "images"), (Cost(1, 300, 1), "bytes"), (Cost(1, 1, 300), "pixels")],
)
def test_bulk_fills_its_part_and_an_interactive_request_still_finds_room(cost: Cost, reason: str) -> None:
    budgets = lanes()
    budgets.admit(cost, lane="bulk")
    with pytest.raises(Overloaded, match="bulk requests") as refused:
        budgets.admit(cost, lane="bulk")
    assert refused.value.reason == reason
    budgets.admit(Cost(5, 500, 500))
    assert budgets.held == cost + Cost(5, 500, 500)
    assert budgets.held_by("bulk") == cost


def test_a_bulk_request_above_bulks_part_is_too_large_and_an_interactive_one_is_not() -> None:
    budgets = lanes()
    with pytest.raises(TooLarge, match="bulk requests may hold at most 5") as refused:
        budgets.admit(Cost(6), lane="bulk")
    assert (refused.value.limit, refused.value.actual) == (5, 6)
    budgets.admit(Cost(6))


def test_bulk_does_not_enter_where_interactive_requests_have_taken_all() -> None:
    budgets = lanes()
    budgets.admit(Cost(10))
    with pytest.raises(Overloaded, match="the service may hold 10 images"):
        budgets.admit(Cost(1), lane="bulk")
    budgets.release(Cost(1), served=True)
    budgets.admit(Cost(1), lane="bulk")
    budgets.release(Cost(1), lane="bulk", served=True)
    assert budgets.held_by("bulk") == Cost()
    assert budgets.held == Cost(9)


def test_an_interactive_request_waits_only_for_its_own_lane_and_bulks_small_share() -> None:
    clock = Clock()
    budgets = Admission(Cost(1000, 1000, 1000), clock=clock)
    budgets.admit(Cost(110))
    served(budgets, clock, images=40, each_s=0.1)  # 10 a second; 70 held
    budgets.admit(Cost(500), lane="bulk")
    assert budgets.estimated_wait_s("interactive") == pytest.approx(
        8.0
    )  # 70, and every eighth turn is bulk's
    assert budgets.estimated_wait_s("bulk") == pytest.approx(57.0)


def test_an_idle_service_never_refuses_for_its_measured_slowness() -> None:
    # A first, cold measurement must not lock everyone out of a service with nothing to do (BentoML#3200).
    clock = Clock()
    budgets = admission(clock)
    budgets.admit(Cost(1))
    served(budgets, clock, images=1, each_s=30.0)
    budgets.admit(Cost(10), deadline_s=1.0)
