"""`dino-serve bench`: loads a service, says what it did and what the machine could have done."""

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Final

from rich.console import Console

from app.api.keys import first_key
from app.bench.diagram import diagram
from app.bench.findings import Findings, Run
from app.bench.payloads import embed_payloads, generated_pictures, is_numbered, pictures_of
from app.bench.processes import CannotBench, ceilings_of, null_service, own_service
from app.bench.runs import Target, closed, opened, sweep
from app.bench.wire import Endpoint
from app.client import Client, ServiceInfo
from app.settings import BenchSettings

# More of them than can be in flight: a service computes what is in flight twice only once.
_PICTURES: Final = 128
_GENERATOR_S: Final = 2.0
_VERSIONS: Final = ("dinoserve", "torch", "uvicorn")


def bench(told: BenchSettings, *, device: str) -> int:
    """Measures, prints a table on standard output, and writes OUT.json and OUT.svg.

    Args:
        told: What to load, and how.
        device: Of a service that is started.

    Returns:
        The exit status: 1 where not one request was answered well.

    Raises:
        CannotBench: There is nothing to load, or nothing to load it with.
        ClientError: What is at the address is no service, or refuses.
        SettingsInvalid: The API key can't be read.
    """
    news = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    pictures = _pictures(told)
    ceilings = None
    if told.url is None:
        news.print("measuring what the machine can do without a service …")
        ceilings = ceilings_of(told.model, device=device, backend=told.backend, images=told.images)
    # By the same backend: "auto" might choose another the second time.
    backend = told.backend if ceilings is None else ceilings.backend
    with _service(told, device, backend) as url:
        target, info = _target(told, url, pictures)
        generator_per_s = _generator_per_s(told, pictures)

        def tell(run: Run) -> None:
            measured = run.measured
            news.print(
                f"{run.load}: {measured.images_per_s:.1f} images/s, p99 {measured.latency_ms(99):.1f} ms"
            )

        runs, held = _loads(told, target, tell)
    findings = Findings(
        setting=_setting(told, info, pictures),
        runs=runs,
        generator_per_s=generator_per_s,
        ceilings=ceilings,
        p99_ms=told.p99_ms,
        held=held,
    )
    Console(soft_wrap=True, highlight=False, markup=False).print(findings.table())
    _write(told, findings, news)
    return 0 if any(run.measured.images_per_s for run in runs) else 1


def _loads(
    told: BenchSettings, target: Target, tell: Callable[[Run], object]
) -> tuple[list[Run], Run | None]:
    if told.p99_ms is not None:
        return sweep(target, clients=told.clients, p99_ms=told.p99_ms, told=tell)
    run = closed(target, clients=told.clients) if told.rate is None else opened(target, rate_per_s=told.rate)
    tell(run)
    return [run], None


def _pictures(told: BenchSettings) -> list[bytes]:
    if told.images is None:
        return generated_pictures(_PICTURES)
    try:
        return pictures_of(told.images)
    except (ValueError, OSError) as error:
        raise CannotBench(str(error)) from None


@contextlib.contextmanager
def _service(told: BenchSettings, device: str, backend: str) -> Iterator[str]:
    if told.url is not None:
        yield told.url
        return
    with own_service(told.model, device=device, backend=backend) as url:
        yield url


def _target(told: BenchSettings, url: str, pictures: list[bytes]) -> tuple[Target, ServiceInfo]:
    api_key = first_key(told.api_key_file) if told.api_key_file else None
    with Client(url, api_key=api_key) as client:
        info = client.info()
    if told.images_per_request > info.max_images:
        raise CannotBench(
            f"--images-per-request is {told.images_per_request}, and this service takes at most "
            f"{info.max_images} in a request"
        )
    try:
        endpoint = Endpoint.of(url)
    except ValueError as error:
        raise CannotBench(str(error)) from None
    payloads = embed_payloads(
        endpoint,
        pictures,
        images_per_request=told.images_per_request,
        api_key=api_key,
        timeout_s=told.timeout_s,
    )
    target = Target(
        base_url=url,
        payloads=payloads,
        api_key=api_key,
        duration_s=told.warm_up_s + told.duration_s,
        warm_up_s=told.warm_up_s,
        timeout_s=told.timeout_s,
    )
    return target, info


def _generator_per_s(told: BenchSettings, pictures: list[bytes]) -> float:
    with null_service() as endpoint:
        payloads = embed_payloads(endpoint, pictures, images_per_request=told.images_per_request)
        target = Target(
            base_url=f"http://{endpoint.host_header}",
            payloads=payloads,
            api_key=None,
            duration_s=_GENERATOR_S,
            warm_up_s=_GENERATOR_S / 4,
            timeout_s=told.timeout_s,
        )
        return closed(target, clients=told.clients).measured.requests_per_s


def _setting(told: BenchSettings, info: ServiceInfo, pictures: list[bytes]) -> dict[str, Any]:
    size_kb = sum(map(len, pictures)) // len(pictures) // 1000
    sort = "generated JPEGs of 500x375" if told.images is None else f"files of {told.images}"
    same = sum(not is_numbered(picture) for picture in pictures)
    sort += f", {same} of them no JPEG and sent unchanged, which a cache may answer" if same else ""
    return {
        "model": info.model_id,
        "service": told.url or "started for this",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in _VERSIONS},
        "pictures": f"{len(pictures)} {sort}, {size_kb} kB on average",
        "images/request": told.images_per_request,
        "seconds": f"{told.duration_s:g} after {told.warm_up_s:g}",
    }


def _write(told: BenchSettings, findings: Findings, news: Console) -> None:
    as_json, as_svg = (told.out.with_name(told.out.name + suffix) for suffix in (".json", ".svg"))
    try:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(findings.as_json(), indent=2) + "\n", encoding="utf-8")
        as_svg.write_text(diagram(findings), encoding="utf-8")
    except OSError as error:
        raise CannotBench(f"the findings can't be written: {error} (--out names another place)") from None
    news.print(f"written: {as_json} and {as_svg}")
