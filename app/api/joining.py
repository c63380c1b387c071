"""What may join a collection, and what requests say of it: made into additions, checked before any work.

Dimension key: D embedding
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
from fastapi import Request

from app.adding import Addition
from app.api.body import SentImage, Upload, image_from_json
from app.api.embed import on_error
from app.api.refusals import InvalidParameter
from app.api.schemas import AddItems, AddParameters, NewItem, OnError, Parameters, parse
from app.api.state import State, refuse_other_model, served_model
from app.errors import FingerprintMismatch
from app.fetching import ImageAddress
from app.search.collection import Collection, Json, Vector
from app.search.rows import check_id, check_vector, check_words
from app.served_models import ServedModel

FINGERPRINT_HEADER: Final = "X-Fingerprint"

T = TypeVar("T")


@dataclass(frozen=True)
class Joining:
    """A collection that a request adds to.

    Attributes:
        name: That was asked for; another collection may have it by the time of a write.
        collection: Of the name.
        model: Whose embeddings pictures get: the collection's, if it is served or the request chose it.
        takes_embeddings: Whether the request named the collection's own fingerprint, and so says whose the
            embeddings are that it brings.
    """

    name: str
    collection: Collection
    model: ServedModel
    takes_embeddings: bool

    def saying(self, fingerprint: str | None) -> "Joining":
        """The same, after the request has named the model of its embeddings, or hasn't.

        Raises:
            FingerprintMismatch: It is another one than the collection's.
        """
        if fingerprint is None:
            return self
        if fingerprint != self.collection.fingerprint:
            raise FingerprintMismatch(
                f"the embeddings are of {fingerprint}, and the collection {self.collection.name!r} holds "
                f"those of {self.collection.fingerprint}: the two don't compare",
                expected=self.collection.fingerprint,
                found=fingerprint,
            )
        return replace(self, takes_embeddings=True)

    def refuse_unless_taken(self, item: NewItem, *, where: str) -> None:
        """Refuses pictures for another model's collection, and embeddings that say not whose they are.

        Raises:
            FingerprintMismatch: The pictures.
            InvalidParameter: The embeddings.
        """
        if item.embedding is None:
            refuse_other_model(self.collection, served=self.model.info.fingerprint)
        elif not self.takes_embeddings:
            raise InvalidParameter(
                f"{where} is an embedding: say whose with ?fingerprint= or {FINGERPRINT_HEADER}, the "
                "collection's own",
                parameter="fingerprint",
            )


def joining_of(state: State, name: str, request: Request) -> Joining:
    """What may join the collection of a name, by what the request says before its body.

    Raises:
        UnknownCollection: There is none of the name.
        UnknownModel: There is none of the name in the query.
        FingerprintMismatch: It is another model's than the request says, or of none that is served where it
            says nothing.
        InvalidParameter: Query and header name two fingerprints.
    """
    collection = state["catalogue"].get(name)
    model = served_model(state, request.query_params.get("model"), fingerprint=collection.fingerprint)
    said = {request.query_params.get("fingerprint"), request.headers.get(FINGERPRINT_HEADER)} - {None}
    if len(said) > 1:
        raise InvalidParameter(
            f"the query and {FINGERPRINT_HEADER} name two fingerprints", parameter="fingerprint"
        )
    if not said:
        refuse_other_model(collection, served=model.info.fingerprint)
    return Joining(name, collection, model, takes_embeddings=False).saying(next(iter(said), None))


def checked_additions(
    state: State, upload: Upload, joining: Joining
) -> tuple[list[Addition], OnError, Parameters]:
    """What a request says, refused by its place there, and before anything is embedded.

    Returns:
        What to add, what a failed image does to the others, and all that the request may say beside.

    Raises:
        InvalidParameter: A parameter can't be, or an embedding says not whose it is.
        UnknownModel: There is none of the name.
        FingerprintMismatch: Of a picture, an embedding or the chosen model, and the collection.
        InvalidItem: An id, metadata or a source can't be kept.
        InvalidVector: An embedding can't be used.
    """
    if upload.in_body:
        said = parse(AddItems, upload.parameters)
        _refuse_another_choice(state, said.model, joining)
        joining = joining.saying(said.fingerprint)
        additions = [
            addition_of(item, joining, where=f"item {index}", pointer=f"/items/{index}/image")
            for index, item in enumerate(said.items)
        ]
        return additions, on_error(said.on_error, upload), said
    form = parse(AddParameters, upload.parameters)
    _refuse_another_choice(state, form.model, joining)
    joining.saying(form.fingerprint)
    refuse_other_model(joining.collection, served=joining.model.info.fingerprint)
    return _form_additions(upload, form), on_error(form.on_error, upload), form


def addition_of(item: NewItem, joining: Joining, *, where: str, pointer: str) -> Addition:
    """One item of JSON, checked.

    Args:
        item: As it was sent.
        joining: Of its request.
        where: It is, for errors.
        pointer: To its image.

    Raises:
        InvalidParameter: As `checked_additions`, and so the others.
    """
    joining.refuse_unless_taken(item, where=where)
    _check_words(item.id, item.metadata, item.source, where=where)
    content: SentImage | ImageAddress | Vector
    if item.embedding is None:
        content = image_from_json(item.image, pointer=pointer)
    else:
        with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and refused
            content = np.asarray(item.embedding, dtype=np.float32)
        check_vector(content, dimensions=joining.collection.dimensions, where=where)
    return Addition(id=item.id, content=content, metadata=item.metadata, source=item.source)


def _refuse_another_choice(state: State, name: str | None, joining: Joining) -> None:
    """A body may name the model too; which of several of one fingerprint embeds is all the same."""
    if name is not None:
        chosen = served_model(state, name).info.fingerprint
        refuse_other_model(joining.collection, served=chosen)


def _form_additions(upload: Upload, form: AddParameters) -> list[Addition]:
    count = len(upload.images)
    ids = _one_each("ids", form.ids, count)
    sources = _one_each("sources", form.sources, count)
    filenames: list[dict[str, Json]] = [
        {"filename": filename} if filename else {} for filename in upload.filenames
    ]
    metadata = _one_each("metadata", form.metadata or filenames, count)
    additions = [
        Addition(id=item_id, content=image, metadata=described or {}, source=source)
        for image, item_id, described, source in zip(upload.images, ids, metadata, sources, strict=True)
    ]
    for index, addition in enumerate(additions):
        _check_words(addition.id, addition.metadata, addition.source, where=f"item {index}")
    return additions


def _check_words(item_id: str | None, metadata: dict[str, Json], source: str | None, *, where: str) -> None:
    if item_id is not None:
        check_id(item_id, where=where)
    check_words(metadata=metadata, source=source, where=where)


def _one_each(name: str, values: Sequence[T], count: int) -> Sequence[T | None]:
    if not values:
        return [None] * count
    if len(values) != count:
        raise InvalidParameter(
            f"there are {count} images and {len(values)} {name}: give one for each image, in "
            "their order, or none",
            parameter=name,
        )
    return values
