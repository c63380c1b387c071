"""A client of the service, for code that waits and for code that doesn't: plain data in and out, no torch.

    with Client("http://127.0.0.1:8000") as client:
        (answer,) = client.embed([Path("cat.jpg")])
        neighbours = client.similar(Path("cat.jpg"), k=5)
        for path, answer in client.embed_folder(Path("photos")):
            ...

    async with AsyncClient() as client:
        rows_BD = await client.embed_array([Path("cat.jpg"), Path("dog.jpg")])

It needs httpx and NumPy; only `app.client.lifecycle` needs what the service needs. docs/client.md says more.
"""

from app.client.asynchronous import AsyncClient
from app.client.blocking import Client
from app.client.collections import CollectionSummary, path_of
from app.client.embedding import Embedded, rows_of
from app.client.errors import (
    Busy,
    ClientError,
    Conflict,
    Invalid,
    NoService,
    NotAllowed,
    NotFound,
    ServiceFailed,
    ServiceRefused,
    TimedOut,
    TooLarge,
)
from app.client.info import ServiceInfo
from app.client.items import Added, Failure, NewVector, StoredItem, Upload
from app.client.search import Explained, Found, FoundGroup, Weighted
from app.client.transport import DEFAULT_URL

__all__ = [
    "DEFAULT_URL",
    "Added",
    "AsyncClient",
    "Busy",
    "Client",
    "ClientError",
    "CollectionSummary",
    "Conflict",
    "Embedded",
    "Explained",
    "Failure",
    "Found",
    "FoundGroup",
    "Invalid",
    "NewVector",
    "NoService",
    "NotAllowed",
    "NotFound",
    "ServiceFailed",
    "ServiceInfo",
    "ServiceRefused",
    "StoredItem",
    "TimedOut",
    "TooLarge",
    "Upload",
    "Weighted",
    "path_of",
    "rows_of",
]
