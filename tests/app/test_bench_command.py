"""`dino-serve bench` against a real service, one that it starts and one that runs; and what it refuses."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.bench.diagram import diagram
from app.bench.findings import Findings, Run, ServerFigures
from app.bench.load import Measured, Sample
from app.bench.payloads import embed_payloads
from app.bench.runs import Target, holds_bound, opened, server_figures, sweep
from app.bench.wire import Endpoint
from app.cli import main
from app.settings import BenchSettings
from tests.app.running import Service, picture, running_service, write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(bundle, tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in BenchSettings.model_fields:
        monkeypatch.delenv(f"DINO_SERVE_{name.upper()}", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def bench(*flags: object) -> int:
    try:
        main(["bench", *map(str, flags)])
    except SystemExit as end:
        status = end.code
    else:
        status = 0
    assert isinstance(status, int)
    return status


@pytest.mark.timeout(240)
def test_without_an_address_it_starts_a_service_and_says_what_share_of_the_machine_it_reached(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "found"
    flags = [
        "--model",
        bundle,
        "--device",
        "cpu",
        "--duration-s",
        "1",
        "--warm-up-s",
        "0.5",
        "--clients",
        "4",
    ]
    assert bench(*flags, "--images-per-request", "2", "--out", out) == 0
    table, news = capsys.readouterr()
    assert "| 4 clients |" in table
    assert "of forward" in table
    assert "the generator by itself reaches" in table
    assert str(out) in news
    found = json.loads(out.with_name("found.json").read_text())
    (run,) = found["runs"]
    assert run["outcomes"] == {"200": run["requests"]}
    assert run["images_per_s"] == pytest.approx(2 * run["requests_per_s"], abs=0.001)
    assert 0 < run["p50_ms"] <= run["p90_ms"] <= run["p99_ms"] <= run["p99.9_ms"]
    ceilings = found["ceilings"]
    assert list(ceilings["forward_by_batch"]) == ["1", "2", "4", "8"]
    best = max(ceilings["forward_by_batch"].values())
    assert run["share_of_forward"] == pytest.approx(run["images_per_s"] / best, abs=1e-3)
    assert 0 < run["server_cores"] <= ceilings["cores"]
    assert 0 < run["device_busy_share"] <= 1
    assert run["server_cpu_ms_per_image"] > 0
    assert 1 <= run["images_per_batch"] <= 8
    assert found["generator_requests_per_s"] > 0
    ET.fromstring(out.with_name("found.svg").read_text())


def test_every_picture_is_new_to_the_service_and_its_figures_are_those_of_the_load(service: Service) -> None:
    endpoint = Endpoint.of(service.url)
    before = server_figures(service.url, None)
    target = Target(
        base_url=service.url,
        payloads=embed_payloads(endpoint, [picture(1)]),
        api_key=None,
        duration_s=1.0,
        warm_up_s=0.0,
        timeout_s=30.0,
    )
    run = opened(target, rate_per_s=20)
    assert run.measured.outcomes == {"200": 20}
    # Twenty times the same pixels: had the service known them, it had launched none but the first.
    assert run.spent("images") == 20
    batches = run.spent("batches")
    assert batches is not None
    assert batches >= 20 / 8
    assert before.cpu_s is not None
    assert run.cores_used is not None
    assert run.images_per_batch == 20 / batches


def test_a_running_service_is_loaded_with_own_pictures_at_a_rate(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2, format="PNG"))
    flags = ["--url", service.url, "--images", tmp_path, "--rate", "20", "--out", tmp_path / "found"]
    assert bench(*flags, "--duration-s", "1", "--warm-up-s", "0") == 0
    table = capsys.readouterr().out
    assert "| 20 requests/s |" in table
    assert "of forward" not in table  # the service's machine is another's
    assert "1 of them no JPEG and sent unchanged, which a cache may answer" in table
    assert json.loads((tmp_path / "found.json").read_text())["runs"][0]["requests"] == 20


def test_bad_pictures_are_errors_by_status_and_exit_status_1(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 is not all that makes a JPEG")
    flags = ["--url", service.url, "--images", tmp_path, "--rate", "10", "--out", tmp_path / "found"]
    assert bench(*flags, "--duration-s", "0.5", "--warm-up-s", "0") == 1
    assert "5 x 422" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(["--url", "http://127.0.0.1:9"], "no service answers", id="nobody"),
        pytest.param(["--rate", "5", "--p99-ms", "5"], "two ways to load", id="two loads"),
        pytest.param(["--images", "nowhere"], "nowhere has no pictures", id="no pictures"),
        pytest.param(["--model", "nowhere"], "nowhere", id="no model"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench(*flags, "--device", "cpu", "--out", tmp_path / "x") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dino-serve: ")
    assert says in last


def test_more_pictures_than_the_service_takes_are_refused(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--url", service.url, "--images-per-request", "300") == 2
    assert "at most 256" in capsys.readouterr().err


def run_of(rate_per_s: float, latency_ms: float, *, failed: int = 0) -> Run:
    samples = [
        Sample(n / 100, n / 100, n / 100 + latency_ms / 1000, "429" if n < failed else "200", 1, "")
        for n in range(100)
    ]
    figures = ServerFigures(cpu_s=None, decode_s=None, device_busy_s=None, images=None, batches=None)
    measured = Measured(samples=samples, warm_up_s=0.0, duration_s=1.0)
    return Run(
        load=f"{rate_per_s:g}/s",
        offered_per_s=rate_per_s,
        measured=measured,
        elapsed_s=1.0,
        before=figures,
        after=figures,
    )


@pytest.mark.timeout(240)
def test_a_sweep_ends_beyond_the_bound_and_says_the_highest_rate_that_held(service: Service) -> None:
    target = Target(
        base_url=service.url,
        payloads=embed_payloads(Endpoint.of(service.url), [picture(1)]),
        api_key=None,
        duration_s=0.5,
        warm_up_s=0.0,
        timeout_s=10.0,
    )
    told: list[Run] = []
    runs, held = sweep(target, clients=1, p99_ms=0.001, told=told.append)
    assert [run.offered_per_s is None for run in runs] == [True, False]  # the first rate breaks it at once
    assert held is None
    assert told == runs
    runs, held = sweep(target, clients=1, p99_ms=60_000, told=told.append)
    rates = [run.offered_per_s for run in runs[1:]]
    assert rates == sorted(rates)  # type: ignore[type-var]
    assert held is not None
    highest = held.offered_per_s or 0.0
    assert all(holds_bound(run, 60_000) for run in runs[1:] if (run.offered_per_s or 0.0) <= highest)
    assert not any(holds_bound(run, 60_000) for run in runs[1:] if (run.offered_per_s or 0.0) > highest)


def test_diagrams_are_wellformed_and_escape_words() -> None:
    swept = Findings(
        setting={"model": "<b>&"},
        runs=[run_of(10, 5), run_of(20, 8), run_of(30, 900)],
        generator_per_s=1_000,
        ceilings=None,
        p99_ms=100,
        held=run_of(20, 8),
    )
    single = Findings(setting={}, runs=[run_of(10, 5, failed=100)], generator_per_s=1_000, ceilings=None)
    for findings in (swept, single):
        drawn = diagram(findings)
        ET.fromstring(drawn)
        assert "<b>" not in drawn
    assert "bound" in diagram(swept)
    assert "p99 stays below 100 ms up to 20/s" in swept.table()


def test_the_table_warns_where_the_generator_may_be_what_was_measured() -> None:
    def table(generator_per_s: float) -> str:
        return Findings(
            setting={}, runs=[run_of(100, 5)], generator_per_s=generator_per_s, ceilings=None
        ).table()

    assert "WARNING" in table(150)
    assert "WARNING" not in table(1_000)
