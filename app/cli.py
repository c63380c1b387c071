"""`dino-serve`: text to settings to a call. The work is elsewhere."""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from rich.console import Console

from app.api.keys import first_key
from app.api.state import Departure
from app.bench.processes import CannotBench
from app.bench_command import bench
from app.client import ClientError
from app.connections import BoundedHeads
from app.errors import DirectoryInUse, ServiceError, StorageError
from app.index_command import default_ledger, index_add, index_stats
from app.index_deletion import Selection, index_delete
from app.lifecycle_command import LIFECYCLE_COMMANDS
from app.main import create_app
from app.search.collection import Catalogue
from app.search.embedded.library import Collections
from app.search.milvus.library import MilvusCollections
from app.served_models import ServedModel, ServedModels, serve_bundle, share_of
from app.server import Server
from app.settings import (
    BenchSettings,
    IndexAddSettings,
    IndexDeleteSettings,
    IndexPlaceSettings,
    IndexSettings,
    Settings,
    SettingsInvalid,
    load,
)
from app.sinks import Place
from app.sources.picture import NoPictures
from app.telemetry import Metrics, set_up_logs
from app.tracing import make_tracing
from dino_core.bundle import Bundle, load_bundle, read_manifest
from dino_core.errors import DinoError

_USAGE = """\
dino-serve: embeddings and neighbours of pictures, from a bundle in models/

  dino-serve run [--model models/default] [--port 8000]   serve it; the page is at http://127.0.0.1:8000
  dino-serve index add SOURCE... [--collection default]   add pictures: folders, tar, lists, Parquet
  dino-serve index delete --collection NAME --id ID...    delete items (also --filter JSON, --all)
  dino-serve index stats                                  show the collections
  dino-serve index export FILE.parquet                    write a collection to a file, and from a file:
  dino-serve index import FILE.parquet
  dino-serve index snapshot [--to FILE]                   copy all collections at one moment, and back:
  dino-serve index restore FILE [--collection default]
  dino-serve index reindex [--collection default]         embed a collection anew with another model
  dino-serve index rescue DIR --to NEW                    save what can be saved of a damaged directory
  dino-serve bench [--url URL] [--rate R | --p99-ms MS]   load a service, and say what the machine could do

Each command has --help. Settings can also be environment variables (DINO_SERVE_PORT), or in a TOML file."""

_LOST = 1  # exit status: the engine is dead, and another process must take its place
_REFUSED = 2  # exit status: nothing was done, and the sentence on stderr says why
_STARTED_POLL_S = 0.02
# How long a thread that computes in Python may keep the others waiting at each of their steps. Beside a
# writer, a thread came back to the lock within 0.6 ms in 99 of 100 cases; with Python's 5 ms, within 1.7 ms.
_SWITCH_INTERVAL_S = 0.0005

logger = logging.getLogger(__name__)


class _CannotStart(Exception):
    """The command can't do its work; the message is for the user."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name, and exits.

    Args:
        arguments: Without the program's name; None for the process's own.

    Raises:
        SystemExit: Always but after a clean end: 2 where nothing was done.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _dispatch(list(arguments))
    except (
        SettingsInvalid,
        _CannotStart,
        CannotBench,
        DinoError,
        ServiceError,
        ClientError,
        NoPictures,
    ) as error:
        _say(f"dino-serve: {error}")
        raise SystemExit(_REFUSED) from None


def _dispatch(arguments: list[str]) -> None:
    match arguments:
        case ["run", *flags]:
            run(load(Settings, flags, prog="dino-serve run"))
        case ["index", "add", *flags]:
            _exit(_index_add(load(IndexAddSettings, flags, prog="dino-serve index add")))
        case ["index", "delete", *flags]:
            _exit(_index_delete(load(IndexDeleteSettings, flags, prog="dino-serve index delete")))
        case ["index", "stats", *flags]:
            _exit(_index_stats(load(IndexSettings, flags, prog="dino-serve index stats")))
        case ["index", command, *flags] if command in LIFECYCLE_COMMANDS:
            _exit(LIFECYCLE_COMMANDS[command](flags, _place))
        case ["bench", *flags]:
            told = load(BenchSettings, flags, prog="dino-serve bench")
            _exit(bench(told, device=_device(told.device)))
        case [] | ["-h" | "--help"]:
            _say(_USAGE)
        case [command, *_]:
            raise _CannotStart(f"there is no command {command!r}\n\n{_USAGE}")


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is under way; see `app.server`.

    Raises:
        SystemExit: The engine is lost.
        SettingsInvalid: The API keys can't be read.
        DinoError: The bundle can't be loaded.
        StorageError: The data directory or the search server can't be used; so DirectoryInUse.
    """
    set_up_logs(level=settings.log_level, json_lines=settings.json_logs)
    # First, as it is the quickest to fail: nobody wants to wait for a model to learn that a port is taken.
    with _bound(settings) as listener:
        metrics = Metrics()
        tracing = None if settings.otlp_endpoint is None else make_tracing(settings.otlp_endpoint)
        bundles = _load_bundles(settings)
        catalogue = _open_collections(settings)
        try:
            models = _models(settings, bundles, metrics)
            departure = Departure()
            app = create_app(
                settings, models, catalogue, metrics=metrics, tracing=tracing, departure=departure
            )
            _serve(settings, app, listener, models, departure)
        finally:
            catalogue.close()
            if tracing is not None:
                tracing.close()


def _open_collections(settings: Settings) -> Catalogue:
    if settings.search_url:
        return MilvusCollections.open(
            settings.search_url, token=settings.search_token(), space=settings.search_space
        )
    try:
        return Collections.open(settings.data_dir)
    except (DirectoryInUse, StorageError) as error:
        raise _CannotStart(f"{error} (--data-dir names the directory)") from None


def _index_add(settings: IndexAddSettings) -> int:
    return index_add(
        settings.sources,
        collection=settings.collection,
        place=_place(settings),
        report=settings.report,
        ledger=settings.ledger or default_ledger(),
        rehash=settings.rehash,
    )


def _index_delete(settings: IndexDeleteSettings) -> int:
    return index_delete(
        Selection(ids=settings.id, filter=settings.filter, everything=settings.all),
        collection=settings.collection,
        place=_place(settings),
        dry_run=settings.dry_run,
        asks=not settings.yes,
    )


def _index_stats(settings: IndexSettings) -> int:
    return index_stats(_place(settings))


def _place(settings: IndexPlaceSettings) -> Place:
    return Place(
        server=settings.server,
        api_key=first_key(settings.api_key_file) if settings.api_key_file else None,
        data_dir=settings.data_dir,
        model=settings.model,
        device=_device(settings.device),
        backend=settings.backend,
    )


def _exit(status: int) -> None:
    if status:
        raise SystemExit(status)


def _load_bundles(settings: Settings) -> list[Bundle]:
    # Their names first, as loading takes a while.
    names = [source.name or read_manifest(source.path).id for source in settings.model]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsInvalid(
            f"two of the models are called {min(twice)!r}: name one otherwise, as --model NAME=BUNDLE"
        )
    return [load_bundle(source.path, device=_device(settings.device)) for source in settings.model]


def _models(settings: Settings, bundles: Sequence[Bundle], metrics: Metrics) -> ServedModels:
    """The models with their engines; measuring what computes fastest takes seconds."""
    config = share_of(
        settings.inference(),
        models=len(settings.model),
        largest_request_bytes=settings.max_request_bytes,
    )

    def load(name: str, path: Path) -> ServedModel:
        bundle = load_bundle(path, device=_device(settings.device))
        return serve_bundle(bundle, config, name=name, metrics=metrics)

    models = [
        serve_bundle(bundle, config, name=source.name, metrics=metrics)
        for source, bundle in zip(settings.model, bundles, strict=True)
    ]
    return ServedModels(models, load=load, root=settings.models_root, patience_s=settings.drain_seconds)


def _serve(
    settings: Settings,
    app: FastAPI,
    listener: socket.socket,
    models: ServedModels,
    departure: Departure,
) -> None:
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    config = server_config(app, settings)
    server = Server(
        config,
        models=models,
        departure=departure,
        lame_duck_s=settings.lame_duck_seconds,
        drain_s=settings.drain_seconds,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve_and_greet(server, listener, _greeting(settings, models, listener), models))
    if not server.started:
        raise _CannotStart("the service could not start; the log above says why")
    if server.lost:
        raise SystemExit(_LOST)


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the app."""
    return uvicorn.Config(
        app,
        http=BoundedHeads,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on the caller's address
        ws="none",
        lifespan="on",
        # The engine gives up what isn't answered by then; its callers shall still hear of it.
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + 1,
    )


async def _serve_and_greet(
    server: uvicorn.Server, listener: socket.socket, greeting: str, models: ServedModels
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(_STARTED_POLL_S)
    if server.started:
        # What is here now lives until the end; a collector that walks it again and again costs pauses.
        gc.collect()
        gc.freeze()
        _say(greeting)
        _reload_on_sighup(models)
    await serving


def _reload_on_sighup(models: ServedModels) -> None:
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly

    def reload() -> None:
        task = loop.create_task(models.reload_changed())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)


def _greeting(settings: Settings, models: ServedModels, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    shown = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    names = ", ".join(model.name for model in models.all())
    return f"dinoserve: {names} at {url} (page: {url}/  API: {url}/docs)  Ctrl-C stops"


def _bound(settings: Settings) -> socket.socket:
    """A socket on the address; the server listens on it once it can serve."""
    with contextlib.ExitStack() as if_it_fails:
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = if_it_fails.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise _CannotStart(
                f"can't listen on {settings.host} port {settings.port}: {error.strerror}. "
                "Is another service there? --port names another port"
            ) from None
        if_it_fails.pop_all()
        return listener


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdecimal()):
        raise SettingsInvalid(f"device is {name!r}: it is auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SettingsInvalid(f"device is {name!r}, and torch finds no CUDA device here: use --device cpu")
    return name


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(text)
