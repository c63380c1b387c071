"""Calls to a Milvus server, which raise our errors and end within a time."""

import logging
from typing import Any
from urllib.parse import urlsplit

from app.errors import StorageError

TIMEOUT_S = 10.0  # of a call; a server that restarts comes back later than anybody wants to wait
_NOT_FOUND = {100, 1600}  # a collection, an alias
_TAKEN = {1601, 1602}  # by a collection, by an alias
_NOT_LOADED = {101, 503}
_CONNECT_FAILED = 2
_UNREACHABLE = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}
_REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}

logger = logging.getLogger(__name__)


class Missing(Exception):
    """The server has no such collection, or no such alias."""


class Taken(Exception):
    """Another collection has the alias."""


class NotLoaded(Exception):
    """The server has the collection, but nobody has told it to load it, or it has not done so yet."""


class MilvusServer:
    """One server. Safe to use from many threads.

    Attributes:
        address: To show; without what may be secret.
    """

    def __init__(self, url: str, *, token: str | None = None) -> None:
        """Connects.

        Raises:
            StorageError: pymilvus isn't installed, or no server answers.
        """
        self.address = _address(url)
        try:
            import grpc  # type: ignore[import-untyped]  # noqa: PLC0415 - without Milvus none is needed
            import pymilvus  # noqa: PLC0415
        except ImportError as error:
            raise StorageError(
                "collections on a Milvus server need the package pymilvus, and it can't be imported "
                f"({error}): pip install 'dinoserve[milvus]'"
            ) from None
        # It logs every error with its traceback before it raises it; what matters we say ourselves.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        self.pymilvus: Any = pymilvus
        self._errors = (pymilvus.MilvusException, grpc.RpcError, ValueError)
        self._client: Any = None
        try:
            self._client = pymilvus.MilvusClient(
                uri=url, token=token or "", timeout=TIMEOUT_S, dedicated=True
            )
        except self._errors as error:
            raise self._translated(error, "connect") from None

    def call(self, method: str, *args: Any, timeout_s: float = TIMEOUT_S, **named: Any) -> Any:  # noqa: ANN401
        """Calls a method of `pymilvus.MilvusClient`.

        Raises:
            Missing: There is no such collection or alias.
            Taken: An alias leads to another collection.
            NotLoaded: The collection can't be read yet.
            StorageError: The server can't be reached in time, or can't do it.
        """
        try:
            return getattr(self._client, method)(*args, timeout=timeout_s, **named)
        except self._errors as error:
            raise self._translated(error, method) from None

    def close(self) -> None:
        """Lets go of the connection. May be called twice."""
        self._client.close()

    def _translated(self, error: Exception, method: str) -> Exception:
        code = getattr(error, "code", None)
        status = getattr(code() if callable(code) else code, "name", code)  # gRPC's errors have a method
        if status in _NOT_FOUND:
            return Missing()
        if status in _TAKEN or (method == "create_alias" and status == 1):
            return Taken()
        if status in _NOT_LOADED:
            return NotLoaded()
        said = getattr(error, "message", None) or str(error)
        logger.warning("the Milvus server at %s failed to %s: %s", self.address, method, said)
        if (
            status == _CONNECT_FAILED
            or status in _UNREACHABLE
            or "Retry timeout" in said
            or _is_closed(error)
        ):
            return StorageError(
                f"no Milvus server answers at {self.address}: start it, or give another --search-url. What "
                "was acknowledged is kept there, and all goes on once it answers again"
            )
        if status in _REFUSED:
            return StorageError(
                f"the Milvus server at {self.address} doesn't accept the token; --search-token-file names "
                "the file that has it"
            )
        return StorageError(
            f"the Milvus server at {self.address} could not {method.replace('_', ' ')} (its code is "
            f"{status}); the log has its own words"
        )


def _is_closed(error: Exception) -> bool:
    """Whether another thread is renewing the connection that a call was about to use."""
    return isinstance(error, ValueError) and "closed channel" in str(error)


def _address(url: str) -> str:
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"
