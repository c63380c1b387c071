"""The client that waits, against a real service."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.client import Client, Embedded, NoService, ServiceRefused
from app.client.items import Added, Failure, NewVector, Upload
from app.client.search import Found, Weighted
from app.search.collection import Json
from tests.app.running import ROOT, Service, picture, running_service, write_tiny_bundle


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running_service(write_tiny_bundle(folder / "tiny"), folder / "data") as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody sleeps; the list says for how long somebody would have."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def uploads(*seeds: int) -> list[Upload]:
    return [
        Upload(id=f"a b/ü{seed}.jpg", data=picture(seed), metadata={"seed": seed, "tags": ["x", "ü"]})
        for seed in seeds
    ]


def test_the_service_says_which_model_it_has_and_what_it_takes(client: Client) -> None:
    info = client.info()
    assert (info.model_id, info.dimensions) == ("tiny", 48)
    assert info.fingerprint.startswith("sha256:")
    assert 0 < info.max_image_bytes < info.max_request_bytes
    assert info.max_images > 0


def test_embeddings_come_in_order_and_a_bad_image_fails_alone(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(2, format="PNG"))
    first, bad, third = client.embed([picture(1), b"not an image", tmp_path / "a.png"])
    assert isinstance(first, Embedded)
    assert isinstance(third, Embedded)
    assert isinstance(bad, Failure)
    assert bad.code == "unsupported_format"
    assert first.embedding.dtype == np.float32
    assert np.linalg.norm(first.embedding) == pytest.approx(1.0, abs=1e-5)
    assert (first.format, third.format) == ("JPEG", "PNG")
    (alone,) = client.embed([picture(1)])
    assert isinstance(alone, Embedded)
    assert float(alone.embedding @ first.embedding) > 0.9999


def test_what_was_added_is_found_listed_and_not_added_again(client: Client) -> None:
    assert client.create_collection("photos").items == 0
    batch = uploads(1, 2, 3)
    assert client.add("photos", batch) == [Added(id=upload.id, status="added") for upload in batch]
    assert client.add("photos", batch) == [Added(id=upload.id, status="unchanged") for upload in batch]
    found = client.similar(picture(2), collection="photos", k=2)
    assert isinstance(found, list)
    assert (found[0].id, found[0].metadata) == ("a b/ü2.jpg", {"seed": 2, "tags": ["x", "ü"]})
    assert found[0].score == pytest.approx(1.0, abs=1e-4)
    by_id = client.similar(id="a b/ü2.jpg", collection="photos", filter={"field": "seed", "gte": 3})
    assert isinstance(by_id, list)
    assert [neighbour.id for neighbour in by_id] == ["a b/ü3.jpg"]
    filtered = client.similar(picture(2), collection="photos", filter={"field": "tags", "contains": "none"})
    assert filtered == []
    assert [item.id for item in client.items("photos")] == [upload.id for upload in batch]
    assert {"default", "photos"} <= {summary.name for summary in client.collections()}


def test_items_vectors_likes_and_batches_are_searched_and_counted(client: Client) -> None:
    client.create_collection("liked")
    names = [upload.id for upload in uploads(*range(10, 18))]
    client.add("liked", uploads(*range(10, 18)))
    assert client.count("liked") == 8
    low: dict[str, Json] = {"field": "seed", "lt": 14}
    assert client.count("liked", filter=low) == 4

    def ids(found: list[Found] | Failure) -> list[str]:
        assert isinstance(found, list), found
        return [one.id for one in found]

    plain = client.similar(id=names[0], collection="liked")
    embedded = [one for one in client.embed([picture(10), picture(11)]) if isinstance(one, Embedded)]
    vector = embedded[0].embedding
    assert ids(client.similar(vector=vector, collection="liked"))[1:] == ids(plain)
    assert ids(client.similar(vector=vector.tolist(), collection="liked", exact=True))[1:] == ids(plain)
    assert ids(client.similar(positive=[names[0]], collection="liked")) == ids(plain)
    weighted = client.similar(positive=[Weighted(names[0], 2.0), vector], collection="liked")
    assert ids(weighted) == ids(plain)
    liked = client.similar(
        positive=[picture(10), names[1]],
        negative=[vector * 0.5],
        collection="liked",
        exclude=[names[0]],
        filter=low,
    )
    assert set(ids(liked)) == {names[2], names[3]}
    best = client.similar(
        positive=names[:2], negative=names[7:], collection="liked", strategy="best_score", k=3
    )
    assert set(ids(best)) <= set(names[2:7])
    diverse = client.similar(picture(10), collection="liked", diversify=0.5, filter=low, exclude=names[:1])
    assert set(ids(diverse)) == set(names[1:4])

    by_id = client.similar_each(ids=[names[0], "nobody"], collection="liked")
    assert ids(by_id[0]) == ids(plain)
    assert isinstance(by_id[1], Failure)
    assert by_id[1].code == "unknown_item"
    both = np.stack([one.embedding for one in embedded])
    by_vector = client.similar_each(vectors=both, collection="liked", k=1)
    assert [ids(one) for one in by_vector] == [names[:1], names[1:2]]
    by_image = client.similar_each(images=[picture(10), b"none"], collection="liked", k=1, filter=low)
    assert ids(by_image[0]) == names[:1]
    assert isinstance(by_image[1], Failure)


def test_groups_and_explanations_are_read(client: Client) -> None:
    client.create_collection("grouped")
    batch = [
        Upload(id=f"{seed}", data=picture(seed), metadata={"deep": {"parity": seed % 2 == 0}})
        for seed in range(20, 28)
    ]
    client.add("grouped", batch)
    groups = client.similar_groups("deep.parity", id="20", group_size=2, collection="grouped")
    assert isinstance(groups, list)
    assert {group.value for group in groups} == {True, False}
    assert [len(group.neighbours) for group in groups] == [2, 2]
    assert client.similar_groups(["deep", "parity"], id="20", group_size=2, collection="grouped") == groups
    by_picture = client.similar_groups("deep.parity", picture(20), collection="grouped")
    assert isinstance(by_picture, list)
    assert by_picture[0].neighbours[0].id == "20"
    assert isinstance(client.similar_groups("deep", b"no image", collection="grouped"), Failure)
    explained = client.explain(id="20", collection="grouped", filter={"field": "deep.parity", "eq": True})
    assert (explained.method, explained.items, explained.matched) == ("rows", 8, 4)
    assert client.explain(picture(20), collection="grouped").matched is None


def test_vectors_of_another_model_are_refused(client: Client) -> None:
    with pytest.raises(ServiceRefused, match="fingerprint_mismatch"):
        client.similar(vector=[1.0] * 48, fingerprint="sha256:other")


def test_a_stream_of_images_is_added_in_requests_of_bounded_size(client: Client) -> None:
    client.create_collection("streamed")
    asked: list[int] = []

    def endless_enough() -> Iterator[Upload]:
        for number in range(300):
            asked.append(number)
            data = picture(number) if number % 100 else b"not an image"
            yield Upload(id=f"{number}", data=data, metadata={"n": number}, source=f"/{number}")

    results = client.add_stream("streamed", endless_enough())
    first = next(results)
    assert len(asked) < 300  # the rest is asked for when it is needed
    every = [first, *results]
    failed = [number for number, result in enumerate(every) if isinstance(result, Failure)]
    assert failed == [0, 100, 200]
    assert every[299] == Added(id="299", status="added")
    (stored,) = client.get("streamed", ["299"])
    assert stored is not None
    assert (stored.metadata, stored.source) == ({"n": 299}, "/299")


def test_a_stream_of_embeddings_is_added_to_the_collection_of_its_model(client: Client) -> None:
    client.create_collection("vectors")
    rows_ND = np.random.default_rng(0).normal(size=(600, 48)).astype(np.float32)
    vectors = [NewVector(id=f"{n:03}", embedding=row, metadata={}) for n, row in enumerate(rows_ND)]
    fingerprint = client.info().fingerprint
    results = list(client.add_vectors("vectors", vectors, fingerprint=fingerprint))
    assert results == [Added(id=vector.id, status="added") for vector in vectors]
    with pytest.raises(ServiceRefused, match="409 fingerprint_mismatch"):
        list(client.add_vectors("vectors", vectors, fingerprint="sha256:other"))


def test_items_are_looked_up_deleted_and_brought_back(client: Client) -> None:
    client.create_collection("kept")
    batch = uploads(1, 2, 3)
    client.add("kept", batch)
    ids = [upload.id for upload in batch]
    found = client.get("kept", [ids[1], "nobody"])
    assert [item and item.id for item in found] == [ids[1], None]
    assert client.delete("kept", ids=[ids[0], "nobody"], dry_run=True) == 1
    assert client.delete("kept", ids=[ids[0]]) == 1
    assert client.delete("kept", filter={"field": "seed", "gte": 2}) == 2
    assert list(client.items("kept")) == []
    assert client.undelete("kept", ids) == 3
    client.drop_collection("kept")
    assert client.collection("kept") is None
    with pytest.raises(ServiceRefused, match="unknown_collection"):
        client.drop_collection("kept")


def test_an_image_that_cannot_be_added_or_searched_says_why(client: Client) -> None:
    bad = Upload(id="bad", data=b"not an image", metadata={})
    good, failure = client.add("default", [*uploads(4), bad])
    assert isinstance(good, Added)
    assert isinstance(failure, Failure)
    assert failure.code == "unsupported_format"
    found = client.similar(b"not an image")
    assert isinstance(found, Failure)
    assert found.code == "unsupported_format"


def test_a_request_has_the_time_that_the_client_waits_and_not_the_services_default(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    with (
        running_service(bundle, tmp_path / "data", "--request-timeout-s", "0.0001") as hasty,
        Client(hasty.url, timeout_s=60) as client,
    ):
        (embedded,) = client.embed([picture(1)])
        (added,) = client.add("default", uploads(2))
        found = client.similar(picture(3))
    assert isinstance(embedded, Embedded)
    assert isinstance(added, Added)
    assert not isinstance(found, Failure)


def test_a_refusal_is_an_error_with_its_code(client: Client) -> None:
    with pytest.raises(ServiceRefused, match="unknown_collection") as refused:
        client.add("nowhere", uploads(1))
    assert (refused.value.status, refused.value.code) == (404, "unknown_collection")
    with pytest.raises(ServiceRefused) as refused:
        client.similar(picture(1), filter={"field": "a", "like": 1})
    assert refused.value.code == "invalid_filter"


def test_uploads_with_and_without_a_source_are_not_mixed(client: Client) -> None:
    with_source = Upload(id="s", data=picture(1), metadata={}, source="/photos/s.jpg")
    with pytest.raises(ValueError, match="give one to all"):
        client.add("default", [with_source, *uploads(1)])


@pytest.mark.parametrize("address", ["", "localhost:8000", "ftp://localhost", "http://[::1", "http://a b"])
def test_an_address_that_is_none_is_said_to_be_none(address: str) -> None:
    with pytest.raises(NoService), Client(address) as client:
        client.info(retry=False)


def test_search_needs_no_torch_and_no_web_framework() -> None:
    modules = "('torch', 'fastapi')"
    program = f"import sys, app.search.embedded.library; sys.exit(any(m in sys.modules for m in {modules}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
