"""What the service refuses, as a tree. No HTTP here: `app.api.problems` maps each leaf to a status, once.

    ServiceError
    ├── TooLarge             one request asks for more than any request may
    ├── InvalidPixels        an array of pixels is not of the model's shape
    ├── Overloaded           no room now; come back after `retry_after_s`
    ├── NotReady             starting, draining, or the device is gone
    └── DeadlineExceeded     the caller's time ran out before the answer was there

Messages say what was found, what was expected and what to do.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Anything that the service refuses, with a sentence for the caller.

    Attributes:
        code: Stable and machine-readable, in snake case; the same for every error of a class.
        title: One sentence for people; names no path and no library's own text.
    """

    code: ClassVar[str] = "service_error"

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self.title = title


class TooLarge(ServiceError):
    """One request asks for more than any request may; sending it again can't help.

    Attributes:
        limit: The bound that was broken.
        actual: What the request has, in the unit of the limit.
    """

    code = "request_too_large"

    def __init__(self, title: str, *, limit: int, actual: int) -> None:
        super().__init__(title)
        self.limit = limit
        self.actual = actual


class InvalidPixels(ServiceError):
    """An array of pixels is not uint8 of the model's shape."""

    code = "invalid_pixels"


class Overloaded(ServiceError):
    """There is no room for this request now.

    Attributes:
        retry_after_s: When there should be room, from the rate measured; above 0.
        reason: Which budget is spent: "images", "bytes", "pixels" or "wait". Bounded, so usable as a metric's label.
    """

    code = "overloaded"

    def __init__(self, title: str, *, retry_after_s: float, reason: str) -> None:
        super().__init__(title)
        self.retry_after_s = retry_after_s
        self.reason = reason


class NotReady(ServiceError):
    """The service starts, drains, or has lost its device."""

    code = "not_ready"


class DeadlineExceeded(ServiceError):
    """The caller's time ran out before the answer was there."""

    code = "deadline_exceeded"
