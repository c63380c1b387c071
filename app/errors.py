"""What the service refuses, as a tree. No HTTP here: `app.api.problems` maps each leaf to a status, once.

    ServiceError
    ├── TooLarge             one request asks for more than any request may
    ├── InvalidPixels        an array of pixels is not of the model's shape
    ├── OutputUnavailable    the model has no such thing: attention, patches, or a pooling
    ├── Overloaded           no room now; come back after `retry_after_s`
    ├── NotReady             starting, draining, or the device is gone
    ├── DeadlineExceeded     the caller's time ran out before the answer was there
    ├── UnknownModel         no model of this name is served
    ├── ModelRefused         a bundle can't take a served model's place; that model still answers
    ├── ReloadUnderWay       another model is being loaded, or the one before still answers
    │   of collections
    ├── UnknownCollection    no collection has this name
    ├── CollectionExists     a collection has this name already
    ├── InvalidCollection    a name or a number of dimensions that no collection can have
    ├── FingerprintMismatch  vectors of one model, a collection of another
    ├── InvalidVector        wrong dimensions, NaN, infinite or zero
    ├── InvalidItem          an id or metadata that cannot be kept
    ├── InvalidFilter        a filter that is malformed; `path` says where
    ├── InvalidQuery         k, offset, threshold, limit or cursor out of bounds
    ├── UnknownItem          the collection has no item of this id
    ├── SuccessorExists      a successor of another model is being built already
    ├── PredecessorChanged   something was written to a collection while its successor was finished
    ├── Unsupported          the engine that keeps the collections can't do this
    ├── InvalidImport        a Parquet file that is not one of ours, or can't be kept
    ├── UnknownSnapshot      no snapshot has this name
    ├── NothingToReindex     the collection's vectors are of the model that is served
    ├── ComputationFailed    a map, duplicates or clusters could not be computed
    ├── StorageError         the data directory is damaged, foreign, full or newer than this program
    └── DirectoryInUse       another process has the data directory open; `pid` says which

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


class OutputUnavailable(ServiceError):
    """The model has no such thing to give: no attention, no patches, no class token to pool by."""

    code = "output_unavailable"


class Overloaded(ServiceError):
    """There is no room for this request now.

    Attributes:
        retry_after_s: When there should be room, from the rate measured; above 0.
        reason: Which budget is spent: "images", "bytes", "pixels" or "wait". Bounded, so usable as a metric's
            label.
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


class UnknownModel(ServiceError):
    """No model of this name is served; the message names those that are."""

    code = "model_not_found"
    parameter = "model"  # that named it, wherever it did


class ModelRefused(ServiceError):
    """A bundle can't be served; the model whose place it should have taken still answers."""

    code = "model_refused"


class ReloadUnderWay(ServiceError):
    """A model is being loaded, or the one that it replaced still answers what it began with."""

    code = "reload_under_way"


class UnknownCollection(ServiceError):
    """No collection has this name."""

    code = "unknown_collection"


class CollectionExists(ServiceError):
    """A collection has this name already."""

    code = "collection_exists"


class InvalidCollection(ServiceError):
    """A name or a number of dimensions that no collection can have."""

    code = "invalid_collection"


class FingerprintMismatch(ServiceError):
    """Vectors of one model were offered to a collection of another; their distances mean nothing.

    Attributes:
        expected: The collection's fingerprint.
        found: The fingerprint that came.
    """

    code = "fingerprint_mismatch"

    def __init__(self, title: str, *, expected: str, found: str) -> None:
        super().__init__(title)
        self.expected = expected
        self.found = found


class InvalidVector(ServiceError):
    """A vector has the wrong dimensions, or is NaN, infinite or zero."""

    code = "invalid_vector"


class InvalidItem(ServiceError):
    """An id or metadata that cannot be kept."""

    code = "invalid_item"


class InvalidFilter(ServiceError):
    """A filter is malformed.

    Attributes:
        path: Where in the filter, as a JSON pointer; empty for the whole.
    """

    code = "invalid_filter"

    def __init__(self, title: str, *, path: str) -> None:
        super().__init__(title)
        self.path = path


class InvalidQuery(ServiceError):
    """A parameter of a search or a listing is out of bounds: k, offset, threshold, limit or cursor."""

    code = "invalid_query"


class UnknownItem(ServiceError):
    """The collection has no item of this id."""

    code = "unknown_item"


class SuccessorExists(ServiceError):
    """A successor of another model is being built already.

    Attributes:
        expected: The fingerprint of the successor that is there.
        found: The fingerprint that came.
    """

    code = "successor_exists"

    def __init__(self, title: str, *, expected: str, found: str) -> None:
        super().__init__(title)
        self.expected = expected
        self.found = found


class PredecessorChanged(ServiceError):
    """Something was written to a collection since its successor was built from it."""

    code = "predecessor_changed"


class Unsupported(ServiceError):
    """The engine that keeps the collections can't do this; the message says what can."""

    code = "unsupported"


class InvalidImport(ServiceError):
    """A file to import is no Parquet of ours: a column is missing, of another type, or damaged."""

    code = "invalid_import"


class UnknownSnapshot(ServiceError):
    """No snapshot has this name."""

    code = "unknown_snapshot"


class NothingToReindex(ServiceError):
    """The collection's vectors are already of the model that is served."""

    code = "nothing_to_reindex"


class ComputationFailed(ServiceError):
    """A map, duplicates or clusters could not be computed; the log says why."""

    code = "computation_failed"


class StorageError(ServiceError):
    """The data directory is damaged, of another program, of a newer version, or cannot be written."""

    code = "storage_error"


class DirectoryInUse(ServiceError):
    """Another process has the data directory open; one process owns it at a time.

    Attributes:
        pid: The process that holds it, or None where it can't be told.
    """

    code = "directory_in_use"

    def __init__(self, title: str, *, pid: int | None) -> None:
        super().__init__(title)
        self.pid = pid
