"""Who may enter, by cost. A request enters whole or not at all, and bulk may fill only a part of the room.

Used from the event loop's thread only, so that a check and the entry it allows are one step, without a lock.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import Overloaded, TooLarge
from app.inference.lanes import TURNS_PER_BULK, Lane

BULK_SHARE = 0.5  # of each budget; the rest is always there for interactive requests
_LONGEST_WAIT = 0.5  # of the time that a request can wait; the rest is for what the estimate doesn't know
_RATE_MEMORY_S = 10.0  # older completions count less than 1/e in the measured rate
_RETRY_AFTER_UNKNOWN_S = 1.0  # before anything was measured
_RETRY_AFTER_RANGE_S = (0.1, 60.0)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request, or a part of it, takes up until it is answered."""

    images: int = 0
    bytes: int = 0
    pixels: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.images + other.images, self.bytes + other.bytes, self.pixels + other.pixels)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.images - other.images, self.bytes - other.bytes, self.pixels - other.pixels)


class Admission:
    """Budgets for what is between arrival and answer.

    Args:
        capacity: The budgets: images, encoded bytes, and pixels as the headers declare them.
        bulk_capacity: What of it bulk requests may hold together; None for all of it.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, capacity: Cost, *, bulk_capacity: Cost | None = None, clock: Callable[[], float]
    ) -> None:
        self._capacity = capacity
        self._bulk_capacity = bulk_capacity or capacity
        self._clock = clock
        self._rate = _Rate()
        self._held_by: dict[Lane, Cost] = {"interactive": Cost(), "bulk": Cost()}

    @property
    def held(self) -> Cost:
        """What has entered and is not answered yet."""
        return self._held_by["interactive"] + self._held_by["bulk"]

    def held_by(self, lane: Lane) -> Cost:
        """The part of it that is one lane's."""
        return self._held_by[lane]

    def admit(self, cost: Cost, *, lane: Lane = "interactive", deadline_s: float | None = None) -> None:
        """Takes the cost from the budgets, all of it or nothing.

        Args:
            cost: Of the whole request.
            lane: A bulk request has to find room among bulk's, too.
            deadline_s: A request that would hardly be answered by then is refused now, while its caller can
                go elsewhere.

        Raises:
            TooLarge: The request is above a budget even of an idle service.
            Overloaded: It isn't, but there is no room now.
        """
        self.check(cost, lane=lane, deadline_s=deadline_s)
        if self.held.images == 0:
            self._rate.begin(self._clock())
        self._held_by[lane] += cost

    def check(self, cost: Cost, *, lane: Lane, deadline_s: float | None) -> None:
        """Refuses what `admit` would refuse, and takes nothing."""
        held = self.held
        if lane == "bulk":
            self._refuse_if_no_room(cost, lane, self._held_by[lane], self._bulk_capacity, "bulk requests")
        self._refuse_if_no_room(cost, lane, held, self._capacity, "the service")
        if deadline_s is not None:
            self._refuse_if_too_late(cost.images, lane, deadline_s)

    def release(self, cost: Cost, *, lane: Lane = "interactive", served: bool) -> None:
        """Gives the cost back.

        Args:
            cost: A part of what was admitted.
            lane: In which.
            served: Whether work was done for it: only that tells how fast the service is.
        """
        self._held_by[lane] -= cost
        self._rate.tick(self._clock(), cost.images if served else 0)

    @property
    def images_per_s(self) -> float | None:
        """Measured while there was work; None before the first image."""
        return self._rate.per_s

    def estimated_wait_s(self, lane: Lane = "interactive") -> float | None:
        """How long a request that enters now waits for those before it; None where nothing tells."""
        rate = self._rate.per_s
        if rate is None or self.held.images == 0:
            return None
        return self._images_before(lane) / rate

    def _images_before(self, lane: Lane) -> float:
        """Images that are worked on before those of a request that enters now."""
        interactive, bulk = self._held_by["interactive"].images, self._held_by["bulk"].images
        if lane == "bulk":
            return interactive + bulk
        return interactive + min(bulk, interactive / (TURNS_PER_BULK - 1))

    def _refuse_if_no_room(self, cost: Cost, lane: Lane, held: Cost, capacity: Cost, whose: str) -> None:
        total = held + cost
        for reason, asked, wanted, limit, there in (
            ("images", cost.images, total.images, capacity.images, held.images),
            ("bytes", cost.bytes, total.bytes, capacity.bytes, held.bytes),
            ("pixels", cost.pixels, total.pixels, capacity.pixels, held.pixels),
        ):
            if asked > limit:
                raise TooLarge(
                    f"the request has {asked:,} {reason}, {whose} may hold at most {limit:,}: split it",
                    limit=limit,
                    actual=asked,
                )
            if wanted > limit:
                share_to_finish = (wanted - limit) / there
                raise Overloaded(
                    f"{whose} may hold {limit:,} {reason} and there are {there:,}: no room for "
                    "this request now",
                    retry_after_s=self._retry_after_s(share_to_finish * self._images_before(lane)),
                    reason=reason,
                )

    def _refuse_if_too_late(self, images: int, lane: Lane, deadline_s: float) -> None:
        wait_s, rate = self.estimated_wait_s(lane), self._rate.per_s
        if wait_s is None or rate is None:
            return
        own_s = images / rate
        # Where the queue is always as long as it may be, half of those who enter would miss a deadline that
        # was cut fine. An idle service takes whatever comes: one slow measurement must not lock everyone out.
        late_s = wait_s - max(0.0, deadline_s - own_s) * _LONGEST_WAIT
        if wait_s > 0 and late_s > 0:
            raise Overloaded(
                f"the answer would take about {wait_s + own_s:.1f} s, if all goes well, and this request's "
                f"deadline is {deadline_s:.1f} s",
                retry_after_s=self._retry_after_s(late_s * rate),
                reason="wait",
            )

    def _retry_after_s(self, images_before: float) -> float:
        rate = self._rate.per_s
        if rate is None:
            return _RETRY_AFTER_UNKNOWN_S
        shortest_s, longest_s = _RETRY_AFTER_RANGE_S
        return min(max(images_before / rate, shortest_s), longest_s)


class _Rate:
    """Images per second of busy time, where what is long ago fades."""

    def __init__(self) -> None:
        self._images = 0.0
        self._seconds = 0.0
        self._last_s = 0.0

    def begin(self, now_s: float) -> None:
        """Work comes after idleness, which doesn't count."""
        self._last_s = now_s

    def tick(self, now_s: float, images: int) -> None:
        passed_s = now_s - self._last_s
        fading = math.exp(-passed_s / _RATE_MEMORY_S)
        self._images = self._images * fading + images
        self._seconds = self._seconds * fading + passed_s
        self._last_s = now_s

    @property
    def per_s(self) -> float | None:
        if self._images == 0 or self._seconds == 0:
            return None
        return self._images / self._seconds
