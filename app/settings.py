"""Every setting of the service, from flags, environment variables and a TOML file: one typed, frozen model.

Precedence: flag > environment (`DINO_SERVE_…`) > file (`--config`) > default.
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.inference.config import Backend, InferenceConfig
from dino_core.decoding import PILLOW_MAX_PIXELS
from dino_core.preprocess import ImageLimits

ENV_PREFIX = "DINO_SERVE_"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SettingsInvalid(Exception):
    """The settings can't be used; the message names each and says what it may be."""


_COMMON = SettingsConfigDict(
    env_prefix=ENV_PREFIX,
    frozen=True,
    use_attribute_docstrings=True,
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_hide_none_type=True,
    cli_avoid_json=True,
    protected_namespaces=(),
)


class _FlagsEnvironmentFile(BaseSettings):
    """The precedence of sources, for the settings of every command."""

    model_config = _COMMON

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first by themselves; the constructor is given the file's values: see `load`."""
        return env_settings, init_settings


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A bundle to serve.

    Attributes:
        name: By which requests choose it; None for the bundle's own.
        path: Its directory.
    """

    name: str | None = None
    path: Path


def _model_sources(value: object) -> object:
    """`models/a`, `mine=models/a`, a comma between several, or a list of such texts."""
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    return tuple(_model_source(one) if isinstance(one, str) else one for one in texts)


def _model_source(text: str) -> ModelSource:
    name, equals, path = text.partition("=")
    if equals and _MODEL_NAME.fullmatch(name):
        return ModelSource(name=name, path=Path(path))
    return ModelSource(path=Path(text))


def _first(value: object) -> object:
    """The first model of a service's setting, for commands that work with one."""
    sources = _model_sources(value)
    return sources[0].path if isinstance(sources, tuple) and sources else value


# NoDecode: an environment variable has a text there, not JSON.
ModelSources = Annotated[
    tuple[ModelSource, ...], NoDecode, Field(min_length=1), BeforeValidator(_model_sources)
]

AnySettings = TypeVar("AnySettings", bound=_FlagsEnvironmentFile)


class IndexPlaceSettings(_FlagsEnvironmentFile):
    """What every `dino-serve index` can be told: where the collections are."""

    model_config = SettingsConfigDict(
        **_COMMON | {"extra": "ignore"}
    )  # the file has the service's settings too

    server: str | None = None
    """A service's address; without one: http://127.0.0.1:8000 if it answers, otherwise --data-dir."""
    data_dir: Path = Path("data")
    """Where collections are kept, if no service runs."""
    model: Annotated[Path, BeforeValidator(_first)] = Path("models/default")
    """The bundle that embeds, if no service runs."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N, if no service runs."""
    backend: Backend = "auto"
    """What computes the model on a CPU, if no service runs; auto takes the fastest that is installed."""
    api_key_file: Path | None = None
    """File whose first key is sent to the service."""
    config: Path | None = None
    """A TOML file with any of these settings, its keys spelled with underscores."""


class IndexSettings(IndexPlaceSettings):
    """What `dino-serve index` can be told of a collection."""

    collection: str = "default"
    """Made if it isn't there."""
    report: Path = Path("index-failures.jsonl")
    """Where pictures that could not be added are named, one JSON line each."""


class IndexAddSettings(IndexSettings):
    """What `dino-serve index add` can be told."""

    sources: CliPositionalArg[list[Path]]
    """Folders, tar files (also compressed), Parquet files, or lists: .txt with a path on each line, .csv or
    .jsonl with a column `path`."""
    report: Path = Path("index-failures.jsonl")
    """Where pictures that could not be added are named, one JSON line each."""
    ledger: Path | None = None
    """Where hashes of files are remembered, so that a second run need not read them; without one: in the
    user's cache."""
    rehash: bool = False
    """Read every file again, also those whose size and times are as they were."""


class IndexDeleteSettings(IndexSettings):
    """What `dino-serve index delete` can be told."""

    id: tuple[str, ...] = ()
    """Items to delete; may be given several times. They can be brought back for seven days."""
    filter: str | None = None
    """JSON: delete the items whose metadata match."""
    all: bool = False
    """Delete the collection itself, with all its items. There is no way back."""
    dry_run: bool = False
    """Only say how many items would go."""
    yes: bool = False
    """Don't ask."""


class IndexExportSettings(IndexPlaceSettings):
    """What `dino-serve index export` can be told."""

    file: CliPositionalArg[Path]
    """The Parquet file to write; one that is there is replaced once the new one is whole."""
    collection: str = "default"
    """Which to export."""
    thumbnails: bool = True
    """Whether there is a column of them."""


class IndexImportSettings(IndexPlaceSettings):
    """What `dino-serve index import` can be told."""

    file: CliPositionalArg[Path]
    """A Parquet file that was exported."""
    collection: str = "default"
    """Made if it isn't there; what it has beside the file's items stays."""


class IndexSnapshotSettings(IndexPlaceSettings):
    """What `dino-serve index snapshot` can be told."""

    to: Path | None = None
    """The file to write; empty: one below the data directory, named after the time."""


class IndexRestoreSettings(IndexPlaceSettings):
    """What `dino-serve index restore` can be told."""

    file: CliPositionalArg[Path]
    """A snapshot: a file, or the name of one below the data directory or of the service."""
    collection: str | None = None
    """Which to restore, in place of the one that has its name. Empty: all, into a new data directory."""
    as_name: str | None = None
    """The name of a collection to make of it instead."""


class IndexRescueSettings(IndexPlaceSettings):
    """What `dino-serve index rescue` can be told."""

    directory: CliPositionalArg[Path]
    """A damaged data directory; it is only read."""
    to: Path
    """A new data directory, for what can be saved."""


class IndexReindexSettings(IndexPlaceSettings):
    """What `dino-serve index reindex` can be told."""

    collection: str = "default"
    """Which to embed anew: with the model that the service serves, or with --model if no service runs."""
    skip_failed: bool = False
    """Leave out what has no picture any more; otherwise it keeps the new embeddings from being used."""


class BenchSettings(_FlagsEnvironmentFile):
    """What `dino-serve bench` can be told."""

    model_config = SettingsConfigDict(
        **_COMMON | {"extra": "ignore"}
    )  # the file has the service's settings too

    url: str | None = None
    """A running service to load; without one, `dino-serve run --model` is started for the time."""
    model: Path = Path("models/default")
    """The bundle of the service that is started."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N, of the service that is started."""
    backend: Backend = "auto"
    """What computes there on a CPU; auto: the fastest that is installed."""
    clients: int = Field(32, ge=1, le=2_000)
    """Closed loop: requests under way at each moment; in a sweep, of the load that comes first."""
    rate: float | None = Field(None, gt=0)
    """Open loop in place of the closed one: requests a second, which come whatever became of those before."""
    p99_ms: float | None = Field(None, gt=0)
    """Sweep: raise the rate until 99 of 100 requests don't keep below this any more."""
    images: Path | None = None
    """A folder of pictures to send; without one, JPEGs of 500x375 are made."""
    images_per_request: int = Field(1, ge=1)
    """Pictures in each request."""
    duration_s: float = Field(10.0, gt=0)
    """How long each load is measured."""
    warm_up_s: float = Field(2.0, ge=0)
    """How long each load runs before."""
    timeout_s: float = Field(30.0, gt=0, le=600)
    """After it a request is given up."""
    api_key_file: Path | None = None
    """File whose first key is sent to the service."""
    out: Path = Path("bench")
    """Where the findings go: OUT.json, and OUT.svg as a diagram."""
    config: Path | None = None
    """A TOML file with any of these settings, its keys spelled with underscores."""

    @model_validator(mode="after")
    def _refuse_two_loads(self) -> "BenchSettings":
        if self.rate is not None and self.p99_ms is not None:
            raise ValueError("--rate and --p99-ms are two ways to load: give one of them")
        return self


class Settings(_FlagsEnvironmentFile):
    """What `dino-serve run` can be told."""

    model_config = SettingsConfigDict(**_COMMON | {"extra": "forbid"})

    model: ModelSources = (ModelSource(path=Path("models/default")),)
    """A bundle to serve, or NAME=BUNDLE to serve it under another name than its own; may be given several
    times. The first is the default; requests choose others by `model`."""
    models_dir: Path | None = None
    """Below it, `POST /admin/reload` may name other bundles; empty: beside the first one of --model."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs --api-key-file or --insecure."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    data_dir: Path = Path("data")
    """Where collections are kept; made if it isn't there."""
    search_url: str | None = None
    """A Milvus server that keeps the collections in place of --data-dir, say http://127.0.0.1:19530."""
    search_token_file: Path | None = None
    """File with the token of that server, "user:password" or a key, if it wants one."""
    search_space: str = Field("dinoserve", pattern="^[A-Za-z][A-Za-z0-9]{0,19}$")
    """Services with the same one share their collections on that server; at most 20 letters and digits."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    backend: Backend = "auto"
    """What computes the model on a CPU: torch, onnxruntime or openvino; auto measures at the start those that
    are installed, and takes the fastest that agrees with torch."""

    api_key_file: Path | None = None
    """File of API keys: on each line a key, or sha256: and its hash, and what it may do: embed, search,
    write, admin; without these words all but admin. With the file, every request for data needs a key. It is
    read again when it changes."""
    insecure: bool = False
    """Listen on other addresses without API keys: anyone who reaches them may read and write."""
    allowed_hosts: tuple[str, ...] = ()
    """More names that the Host header may have, beside this machine's own."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of other sites whose pages may call, say https://photos.example.org."""

    allow_url_inputs: bool = False
    """Fetch images that requests name by URL, from the public internet only."""
    url_hosts: tuple[str, ...] = ()
    """Fetch from these hosts only, say images.example.org; one like images.example.org:8443 also allows a
    port beside 80 and 443."""

    max_request_bytes: int = Field(100 * 2**20, ge=1024)
    """Of a whole body, but for a file to import."""
    max_import_bytes: int = Field(64 * 2**30, ge=1024)
    """Of a Parquet file to import; it waits on the data directory's disk until all of it is here."""
    max_image_bytes: int = Field(20 * 2**20, ge=1024)
    """Of one image's file."""
    max_image_pixels: int = Field(89_478_485, ge=1, le=PILLOW_MAX_PIXELS)
    """Of one image as its header declares; the default is Pillow's."""
    max_client_batch_size: int = Field(256, ge=1)
    """Images of one request."""
    max_concurrent_images: int = Field(1024, ge=1)
    """Images between arrival and answer, of all requests; above it the answer is 429."""
    request_timeout_s: float = Field(30.0, gt=0)
    """From a whole body to its answer, unless the request says how long; then 504."""
    max_request_timeout_s: float = Field(600.0, gt=0)
    """The longest that a request may say; what is above it counts as this."""
    upload_timeout_s: float = Field(120.0, gt=0)
    """For a body to arrive; then 408."""

    max_batch_size: int | None = Field(None, ge=1)
    """Images of one launch of the model; empty: by the device."""
    decode_threads: int | None = Field(None, ge=1)
    """Threads that decode; empty: by the machine."""
    compute_threads: int | None = Field(None, ge=1)
    """Native threads of a model on the CPU; empty: by the machine."""
    cache_size: int = Field(4096, ge=0)
    """Embeddings to keep by content; 0 for none. 4,096 take 7 MB if they have 384 dimensions, 21 if 1,280."""

    lame_duck_seconds: float = Field(3.0, ge=0)
    """How long after SIGTERM requests are still taken, while readiness is false already: give it what your
    load balancer needs to notice. Ctrl-C does without it."""
    drain_seconds: float = Field(20.0, ge=0)
    """How long a stop then waits for requests that are under way."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    otlp_endpoint: str | None = None
    """A collector of OpenTelemetry spans, by OTLP over HTTP, say http://127.0.0.1:4318; needs extra otel."""
    json_logs: bool = False
    """Log JSON lines, one for each request too; otherwise plain text without requests."""
    config: Path | None = None
    """A TOML file with any of these settings, its keys spelled with underscores."""

    @model_validator(mode="after")
    def _refuse_an_open_door(self) -> "Settings":
        if not (self.is_loopback or self.api_key_file or self.insecure):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there are no API keys: "
                "give --api-key-file FILE, or say --insecure if your network keeps strangers out"
            )
        return self

    @field_validator("search_url")
    @classmethod
    def _refuse_what_is_no_server(cls, url: str | None) -> str | None:
        if not url:
            return None
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("search_url is no address of a Milvus server; it is like http://127.0.0.1:19530")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "search_url has a password in it, which logs would show: use --search-token-file"
            )
        return url

    @model_validator(mode="after")
    def _refuse_requests_that_could_never_enter(self) -> "Settings":
        if self.max_client_batch_size > self.max_concurrent_images:
            raise ValueError(
                f"max_client_batch_size ({self.max_client_batch_size}) is above max_concurrent_images "
                f"({self.max_concurrent_images}): such a request could never enter"
            )
        return self

    @model_validator(mode="after")
    def _refuse_hosts_that_nothing_is_fetched_from(self) -> "Settings":
        if self.url_hosts and not self.allow_url_inputs:
            raise ValueError("url_hosts is given, and images by URL are off: say --allow-url-inputs too")
        return self

    @property
    def models_root(self) -> Path | None:
        """Below which bundles may be loaded later; None where that would be the whole disk."""
        root = self.models_dir or self.model[0].path.absolute().parent
        return None if root == root.parent else root

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def search_token(self) -> str | None:
        """What `search_token_file` holds; None without one.

        Raises:
            SettingsInvalid: The file can't be read, or has nothing in it.
        """
        if self.search_token_file is None:
            return None
        try:
            token = self.search_token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsInvalid(
                f"search token file {self.search_token_file} can't be read: {error}"
            ) from None
        if not token:
            raise SettingsInvalid(f"search token file {self.search_token_file} is empty")
        return token

    def inference(self) -> InferenceConfig:
        """The part that is the engine's."""
        return InferenceConfig(
            backend=self.backend,
            max_batch=self.max_batch_size,
            decode_threads=self.decode_threads,
            compute_threads=self.compute_threads,
            max_images_per_request=self.max_client_batch_size,
            max_image_bytes=self.max_image_bytes,
            max_images_in_flight=self.max_concurrent_images,
            max_bytes_in_flight=max(512 * 2**20, 2 * self.max_request_bytes),
            limits=ImageLimits(max_pixels=self.max_image_pixels),
            timeout_s=self.request_timeout_s,
            cache_rows=self.cache_size,
            drain_s=self.drain_seconds,
        )


def load(kind: type[AnySettings], arguments: Sequence[str], *, prog: str) -> AnySettings:
    """Reads settings from flags, the environment and the file that either names.

    Args:
        kind: Of the command.
        arguments: The command line without the program's name.
        prog: Shown by --help.

    Raises:
        SettingsInvalid: A value can't be used, or the file can't be read.
        SystemExit: --help was asked for (0), or there is no such flag (2).
    """
    file_values = _read_toml(_config_file(arguments))
    try:
        # In a dict, as these belong to the library and aren't settings.
        command_line: dict[str, Any] = {"_cli_parse_args": list(arguments), "_cli_prog_name": prog}
        return kind(**command_line, **file_values)
    except ValidationError as error:
        raise SettingsInvalid(_sentence(error)) from None


def _config_file(arguments: Sequence[str]) -> Path | None:
    """The file must be known before the rest can be read, as its values come below flags and environment."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
        if argument == "--config" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
    named = os.environ.get(f"{ENV_PREFIX}CONFIG")
    return Path(named) if named else None


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsInvalid(f"config file {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"config file {path} is not TOML: {error}") from None
    return values


def _sentence(error: ValidationError) -> str:
    """Pydantic's findings in our words: which setting, what is wrong, what it was."""
    found = []
    for finding in error.errors():
        name = ".".join(str(part) for part in finding["loc"])
        if finding["type"] == "value_error":
            found.append(finding["msg"].removeprefix("Value error, "))
        elif finding["type"] == "extra_forbidden":
            found.append(f"there is no setting {name}")
        else:
            found.append(
                f"{name}: {finding['msg'][0].lower()}{finding['msg'][1:]} (found {finding['input']!r})"
            )
    return "; ".join(found)
