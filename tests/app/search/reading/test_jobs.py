import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from app.errors import ComputationFailed, Overloaded, UnknownCollection
from app.search.embedded.library import Collections
from app.search.reading import jobs as reading
from app.search.reading.jobs import Look, ReadingJobs, Result, Wanted
from app.search.reading.views import WHOLE_MAP, map_points
from tests.app.search.planted import MODEL, clusters, directions, fill

D = 16
MAP, DUPLICATES, CLUSTERS = Wanted(kind="map"), Wanted(kind="duplicates"), Wanted(kind="clusters")
PATIENCE_S = 120  # the computations run behind everything else, and a busy machine has much of that

StartJobs = Callable[[], ReadingJobs]


@pytest.fixture
def collections(tmp_path: Path) -> Iterator[Collections]:
    with Collections.open(tmp_path / "data") as opened:
        opened.create("default", fingerprint=MODEL, dimensions=D)
        yield opened


@pytest.fixture
def start(collections: Collections, tmp_path: Path) -> Iterator[StartJobs]:
    """Starts jobs on one folder; those before are closed, as in a restart."""
    started: list[ReadingJobs] = []

    def start_one() -> ReadingJobs:
        if started:
            started[-1].close()
        started.append(ReadingJobs(collections, folder=tmp_path / "reading"))
        return started[-1]

    yield start_one
    for jobs in started:
        jobs.close()


def until(look: Callable[[], Look], is_enough: Callable[[Look], bool]) -> Look:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_enough(found := look()):
        assert time.monotonic() < deadline_s, f"it takes too long: {found}"
        time.sleep(0.02)
    return found


def ready(jobs: ReadingJobs, wanted: Wanted, name: str = "default") -> Result:
    """The fresh result."""
    found = until(lambda: jobs.look(name, wanted), lambda found: not found.is_stale)
    assert found.result is not None
    return found.result


@pytest.mark.parametrize("wanted", [MAP, DUPLICATES, CLUSTERS], ids=lambda wanted: wanted.kind)
def test_the_first_look_begins_a_computation_and_a_later_one_has_its_result(
    collections: Collections, start: StartJobs, wanted: Wanted
) -> None:
    ids = fill(collections.get("default"), clusters(3, each=10, dimensions=D)[0])
    jobs = start()
    first = jobs.look("default", wanted)
    assert (first.result, first.is_stale) == (None, True)
    assert first.progress is not None
    assert first.retry_after_s >= 1
    result = ready(jobs, wanted)
    assert result.items == 30
    assert result.ids.take(range(30)) == ids
    assert result.seq == collections.get("default").seq
    assert abs(result.computed_at - time.time()) < PATIENCE_S
    assert jobs.look("default", wanted).progress is None


def test_a_collection_without_items_has_a_result_without_items(start: StartJobs) -> None:
    jobs = start()
    for wanted in (MAP, DUPLICATES, CLUSTERS):
        assert ready(jobs, wanted).items == 0
    assert map_points(ready(jobs, MAP), box=WHOLE_MAP, limit=10).ids == []


def test_a_restart_reads_what_was_kept_and_computes_nothing(
    collections: Collections, start: StartJobs
) -> None:
    fill(collections.get("default"), directions(20, D))
    before = ready(start(), MAP)
    after = start().look("default", MAP)  # at once
    assert after.result is not None
    assert (after.is_stale, after.progress, after.result.computed_at) == (False, None, before.computed_at)
    np.testing.assert_array_equal(after.result.kept.arrays["xy"], before.kept.arrays["xy"])


def test_a_damaged_file_is_computed_again(
    collections: Collections, start: StartJobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(collections.get("default"), directions(20, D))
    before = ready(start(), MAP)
    path = tmp_path / "reading" / "default" / "map.reading"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    jobs = start()
    assert jobs.look("default", MAP).result is None
    assert "damaged" in caplog.text
    again = ready(jobs, MAP)
    np.testing.assert_array_equal(again.kept.arrays["xy"], before.kept.arrays["xy"])


def test_a_stale_result_is_given_while_the_next_is_computed_and_the_map_goes_on(
    collections: Collections, start: StartJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MIN_PAUSE_S", 0.0)
    monkeypatch.setattr(reading, "_PAUSE_PER_DURATION", 0.0)
    collection = collections.get("default")
    ids = fill(collection, directions(40, D))
    jobs = start()
    before = ready(jobs, MAP)
    collection.delete(ids[:1])
    fill(collection, directions(2, D, seed=1), first=40)
    look = jobs.look("default", MAP)
    assert look.is_stale
    assert look.progress is not None
    assert look.result is before
    after = ready(jobs, MAP)
    assert after.items == 41
    points = map_points(after, box=WHOLE_MAP, limit=100)
    assert points.ids == [*ids[1:], "item/000040", "item/000041"]
    np.testing.assert_array_equal(points.xy_N2[:39], before.kept.arrays["xy"][1:])
    assert after.kept.facts["placed_items"] == 2


def test_a_map_goes_on_after_a_restart(collections: Collections, start: StartJobs) -> None:
    collection = collections.get("default")
    fill(collection, directions(40, D))
    before = ready(start(), MAP)
    fill(collection, directions(2, D, seed=1), first=40)
    after = ready(start(), MAP)
    np.testing.assert_array_equal(after.kept.arrays["xy"][:40], before.kept.arrays["xy"])


def test_a_collection_that_is_being_filled_is_not_computed_again_at_every_look(
    collections: Collections, start: StartJobs
) -> None:
    collection = collections.get("default")
    fill(collection, directions(5, D))
    jobs = start()
    before = ready(jobs, DUPLICATES)
    fill(collection, directions(1, D, seed=1), first=5)
    look = jobs.look("default", DUPLICATES)
    assert (look.result, look.is_stale, look.progress) == (before, True, None)
    assert look.retry_after_s >= 1


def test_a_collection_made_again_has_nothing_of_the_one_before(
    collections: Collections, start: StartJobs
) -> None:
    fill(collections.get("default"), directions(5, D))
    assert ready(start(), MAP).items == 5
    collections.drop("default")
    # The same number of writes, so the same seq.
    fill(collections.create("default", fingerprint=MODEL, dimensions=D), directions(3, D))
    for _ in range(2):
        assert ready(start(), MAP).items == 3


def test_an_alias_shares_what_is_kept_of_its_collection(collections: Collections, start: StartJobs) -> None:
    fill(collections.get("default"), directions(5, D))
    collections.set_alias("photos", "default")
    jobs = start()
    assert ready(jobs, MAP, name="photos") is ready(jobs, MAP)


def test_a_cancelled_job_leaves_nothing_and_the_next_look_begins_again(
    collections: Collections, start: StartJobs, tmp_path: Path
) -> None:
    fill(collections.get("default"), directions(3_000, D))
    jobs = start()
    until(lambda: jobs.look("default", MAP), lambda found: (found.progress or 0) > 0.3)
    started_s = time.monotonic()
    jobs.forget("default", MAP)
    assert time.monotonic() - started_s < 1
    look = jobs.look("default", MAP)
    assert look.result is None
    assert look.progress == 0
    jobs.forget("default", MAP)
    assert not list((tmp_path / "reading").glob("default/map*"))


def test_forgetting_deletes_what_was_kept(collections: Collections, start: StartJobs, tmp_path: Path) -> None:
    fill(collections.get("default"), directions(5, D))
    jobs = start()
    ready(jobs, MAP)
    jobs.forget("default", MAP)
    jobs.forget("default", MAP)  # may be said twice
    assert not (tmp_path / "reading" / "default" / "map.reading").exists()
    with pytest.raises(UnknownCollection):
        jobs.forget("none", MAP)


def test_closing_stops_what_is_under_way_and_leaves_no_copies(
    collections: Collections, start: StartJobs, tmp_path: Path
) -> None:
    fill(collections.get("default"), directions(3_000, D))
    jobs = start()
    jobs.look("default", DUPLICATES)
    until(lambda: jobs.look("default", MAP), lambda found: (found.progress or 0) > 0.3)
    started_s = time.monotonic()
    jobs.close()
    assert time.monotonic() - started_s < 1
    assert not (tmp_path / "reading" / "spool").exists()
    with pytest.raises(Overloaded, match="stopping"):
        jobs.look("default", CLUSTERS)


def test_copies_that_a_killed_process_left_are_deleted(start: StartJobs, tmp_path: Path) -> None:
    left = tmp_path / "reading" / "spool" / "vectors.f32"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    start()
    assert not left.parent.exists()


def test_copies_are_deleted_once_nothing_waits_for_them(
    collections: Collections, start: StartJobs, tmp_path: Path
) -> None:
    fill(collections.get("default"), directions(5, D))
    jobs = start()
    for wanted in (MAP, DUPLICATES, CLUSTERS):
        jobs.look("default", wanted)
    for wanted in (MAP, DUPLICATES, CLUSTERS):
        ready(jobs, wanted)
    until(lambda: jobs.look("default", MAP), lambda _: not (tmp_path / "reading" / "spool").exists())


def test_without_a_folder_results_last_until_the_end(collections: Collections) -> None:
    fill(collections.get("default"), directions(5, D))
    jobs = ReadingJobs(collections, folder=None)
    result = ready(jobs, MAP)
    folder = jobs._folder
    assert list(folder.glob("default/*"))
    jobs.close()
    assert not folder.exists()
    assert result.items == 5  # who has it may still read it


def test_what_is_kept_of_dropped_collections_and_of_many_clusterings_is_deleted(
    collections: Collections, start: StartJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_CLUSTERINGS", 2)
    fill(collections.create("other", fingerprint=MODEL, dimensions=D), directions(5, D))
    fill(collections.get("default"), directions(30, D))
    jobs = start()
    ready(jobs, MAP, name="other")
    collections.drop("other")
    with pytest.raises(UnknownCollection):
        jobs.look("other", MAP)
    kept = tmp_path / "reading"
    for count in range(1, reading.MAX_CLUSTERINGS + 2):
        ready(jobs, Wanted(kind="clusters", clusters=count))
    assert [path.name for path in kept.iterdir() if path.name != "spool"] == ["default"]
    assert len(list(kept.glob("default/clusters-*"))) == reading.MAX_CLUSTERINGS
    assert not (kept / "default" / "clusters-1.reading").exists()
    # It is a matter of asking again.
    assert len(ready(jobs, Wanted(kind="clusters", clusters=1)).kept.arrays["sizes"]) == 1


def test_too_many_that_wait_are_refused(
    collections: Collections, start: StartJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_WAITING", 2)
    fill(collections.get("default"), directions(3_000, D))
    jobs = start()
    jobs.look("default", MAP)
    jobs.look("default", DUPLICATES)
    with pytest.raises(Overloaded) as refused:
        jobs.look("default", CLUSTERS)
    assert refused.value.retry_after_s > 0


def test_a_failure_is_told_and_tried_again_later(
    collections: Collections, start: StartJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collections.get("default"), directions(5, D))
    jobs = start()
    with monkeypatch.context() as broken:
        broken.setattr("app.search.reading.work._MODULE", "app.search.no_such_module")
        jobs.look("default", MAP)
        with pytest.raises(ComputationFailed):
            until(lambda: jobs.look("default", MAP), lambda _: False)
    with pytest.raises(ComputationFailed):  # not at every look
        jobs.look("default", MAP)
    jobs._slots["default", MAP].not_before_s = 0.0  # a minute later
    assert ready(jobs, MAP).items == 5


def test_a_folder_that_can_not_be_written_fails_the_computation_in_words(
    collections: Collections, start: StartJobs, tmp_path: Path
) -> None:
    (tmp_path / "reading").write_text("a file in the folder's place")
    jobs = start()
    jobs.look("default", MAP)
    with pytest.raises(Exception, match="map could not be kept: ") as failed:
        until(lambda: jobs.look("default", MAP), lambda _: False)
    assert type(failed.value).__name__ == "StorageError"
