"""Where the time of one picture went, on its way through the engine.

    began ─ queue ─► decoding ─► decoded ─ queue ─► launched ─► computed ─► answered

Moments are of the monotonic clock, which Linux shares with `perf_counter`. A request has the moments of the
picture that was settled last: nothing else kept its caller waiting.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

_ORDER: Final = ("decoding_s", "decoded_s", "launched_s", "computed_s")


@dataclass(slots=True)
class Stages:
    """Moments of one picture's work; 0 where it never came so far, or needed not: a stored embedding, say."""

    decoding_s: float = 0.0
    decoded_s: float = 0.0
    launched_s: float = 0.0
    computed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Passage:
    """One call of the engine, with the moments of its last picture; each is at least the one before.

    Attributes:
        began_s: When the engine was called.
        stages: None where no picture was computed.
        ended_s: When the caller was woken.
        images: Of the call.
    """

    began_s: float
    stages: Stages | None
    ended_s: float
    images: int

    def moments_s(self) -> tuple[float, float, float, float, float]:
        """Began, decoding, decoded, launched, computed: none is before another, nor after the end."""
        moments_s = [self.began_s]
        for name in _ORDER:
            moment_s = getattr(self.stages, name) if self.stages is not None else 0.0
            # Who joined another's work may have come when it was half done.
            moments_s.append(min(max(moment_s, moments_s[-1]), self.ended_s))
        began_s, decoding_s, decoded_s, launched_s, computed_s = moments_s
        return began_s, decoding_s, decoded_s, launched_s, computed_s

    def parts_ms(self) -> dict[str, float]:
        """Durations that add up to the whole; `answer` is the way back to the caller."""
        began_s, decoding_s, decoded_s, launched_s, computed_s = self.moments_s()
        return {
            "queue": (decoding_s - began_s + launched_s - decoded_s) * 1_000,
            "decode": (decoded_s - decoding_s) * 1_000,
            "forward": (computed_s - launched_s) * 1_000,
            "answer": (self.ended_s - computed_s) * 1_000,
        }


@dataclass(slots=True)
class Passages:
    """The engine's calls within one request: the first ones, as a stream may have any number.

    Attributes:
        most: How many are kept.
    """

    most: int = 32
    seen: list[Passage] = field(default_factory=list)

    def add(self, passage: Passage) -> None:
        """Notes a call of the engine."""
        if len(self.seen) < self.most:
            self.seen.append(passage)


# Who wants to know sets it around the request; the engine finds it there, whatever lies between.
passages: ContextVar[Passages | None] = ContextVar("passages", default=None)
