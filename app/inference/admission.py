"""Who may enter, by cost. A request enters whole or not at all.

Used from the event loop's thread only, so that a check and the entry it allows are one step, without a lock.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import Overloaded, TooLarge

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
        clock: Seconds, monotonic.
    """

    def __init__(self, capacity: Cost, *, clock: Callable[[], float]) -> None:
        self._capacity = capacity
        self._clock = clock
        self._rate = _Rate()
        self.held = Cost()

    def admit(self, cost: Cost, *, deadline_s: float | None = None) -> None:
        """Takes the cost from the budgets, all of it or nothing.

        Args:
            cost: Of the whole request.
            deadline_s: A request that would still be waiting then is refused now, while its caller can go
                elsewhere.

        Raises:
            TooLarge: The request is above a budget even of an idle service.
            Overloaded: It isn't, but there is no room now.
        """
        self._refuse_if_too_large(cost)
        total = self.held + cost
        for reason, wanted, limit, held in (
            ("images", total.images, self._capacity.images, self.held.images),
            ("bytes", total.bytes, self._capacity.bytes, self.held.bytes),
            ("pixels", total.pixels, self._capacity.pixels, self.held.pixels),
        ):
            if wanted > limit:
                share_to_finish = (wanted - limit) / held
                raise Overloaded(
                    f"the service holds {held:,} {reason} of at most {limit:,}: no room for this request now",
                    retry_after_s=self._retry_after_s(share_to_finish * self.held.images),
                    reason=reason,
                )
        wait_s = self.estimated_wait_s
        if deadline_s is not None and wait_s is not None and wait_s > deadline_s:
            raise Overloaded(
                f"the wait would be about {wait_s:.1f} s, and this request's deadline is {deadline_s:.1f} s",
                retry_after_s=self._retry_after_s(self.held.images * (1 - deadline_s / wait_s)),
                reason="wait",
            )
        if self.held.images == 0:
            self._rate.begin(self._clock())
        self.held = total

    def release(self, cost: Cost, *, served: bool) -> None:
        """Gives the cost back.

        Args:
            cost: A part of what was admitted.
            served: Whether work was done for it: only that tells how fast the service is.
        """
        self.held = self.held - cost
        self._rate.tick(self._clock(), cost.images if served else 0)

    @property
    def images_per_s(self) -> float | None:
        """Measured while there was work; None before the first image."""
        return self._rate.per_s

    @property
    def estimated_wait_s(self) -> float | None:
        """How long a request that enters now waits for those before it; None where nothing tells."""
        rate = self._rate.per_s
        if rate is None or self.held.images == 0:
            return None
        return self.held.images / rate

    def _retry_after_s(self, images_before: float) -> float:
        rate = self._rate.per_s
        if rate is None:
            return _RETRY_AFTER_UNKNOWN_S
        shortest_s, longest_s = _RETRY_AFTER_RANGE_S
        return min(max(images_before / rate, shortest_s), longest_s)

    def _refuse_if_too_large(self, cost: Cost) -> None:
        for what, actual, limit in (
            ("images", cost.images, self._capacity.images),
            ("bytes", cost.bytes, self._capacity.bytes),
            ("pixels", cost.pixels, self._capacity.pixels),
        ):
            if actual > limit:
                raise TooLarge(
                    f"the request has {actual:,} {what}, the service holds at most {limit:,}: split it",
                    limit=limit,
                    actual=actual,
                )


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
