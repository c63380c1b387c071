"""The models that a service runs, by name, each with its engine; requests hold the one they began with.

reload: load beside ─► warm up ─► switch the name ─► wait for those who hold the old one ─► free it
"""

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.errors import ModelRefused, ReloadUnderWay, UnknownModel
from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from app.inference.results import ModelInfo
from app.inference.threads import cpu_budget, use_native_threads
from app.telemetry import Metrics, Present
from dino_core.bundle import Bundle, Manifest, read_manifest
from dino_core.errors import DinoError

Load = Callable[[str, Path], "ServedModel"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reloaded:
    """What a reload did.

    Attributes:
        model: Serves now.
        replaced: Served before.
        holders: Requests that the one before still has to answer; with 0 it is freed.
    """

    model: "ServedModel"
    replaced: ModelInfo
    holders: int


@dataclass(eq=False)
class ServedModel:
    """A model and its engine.

    Attributes:
        name: By which requests choose it; its answers' `model.id`.
        path: Of its bundle.
        manifest: Of its bundle, with the name as `id`.
        engine: Its own: threads, budgets, cache.
        holders: Requests that have taken it and not given it back.
    """

    name: str
    path: Path
    manifest: Manifest
    engine: Engine
    holders: int = field(default=0, init=False)
    _unheld: Callable[[], None] | None = field(default=None, init=False)

    @property
    def info(self) -> ModelInfo:
        """What answers say about it."""
        return self.engine.model


def serve_bundle(
    bundle: Bundle, config: InferenceConfig, *, name: str | None = None, metrics: Metrics | None = None
) -> ServedModel:
    """Makes the engine of a bundle; it isn't started.

    Args:
        bundle: Loaded.
        config: The engine's share; see `share_of`.
        name: None for the bundle's own.
        metrics: Hear what the engine does; None: nobody does.
    """
    named = replace(bundle, manifest=replace(bundle.manifest, id=name or bundle.manifest.id))
    observer = None if metrics is None else metrics.of(named.manifest.id)
    return ServedModel(
        named.manifest.id,
        bundle.path,
        named.manifest,
        Engine(named, config, observer=observer),
    )


def share_of(config: InferenceConfig, *, models: int, largest_request_bytes: int = 0) -> InferenceConfig:
    """One model's share of what the service may take, so that many models together take no more than one.

    Cores are divided, and with them the threads that decode and compute, at least one of each; two pools of
    as many threads as there are cores would each wait for the other's. Threads that a setting names are each
    model's. Budgets are divided too, but for what the largest request takes: it must be able to enter.

    Args:
        config: Of the service.
        models: How many it runs.
        largest_request_bytes: That the service takes.
    """
    return replace(
        config,
        cores=max(1, (config.cores or cpu_budget()) // models),
        max_images_in_flight=max(config.max_images_per_request, config.max_images_in_flight // models),
        max_bytes_in_flight=max(largest_request_bytes, config.max_bytes_in_flight // models),
        max_pixels_in_flight=max(config.limits.max_pixels, config.max_pixels_in_flight // models),
    )


class ServedModels:
    """The models of one service; the first is the default. Safe to use from many threads.

    Args:
        models: At least one, of different names; not started.
        load: Loads the bundle of a path, to serve it under a name; blocks.
        root: The directory below which reloads may name bundles; None: nowhere.
        patience_s: How long a reload waits for requests that hold the old model; the model waits on.

    Attributes:
        default: The name of the first.
    """

    def __init__(
        self, models: Sequence[ServedModel], *, load: Load, root: Path | None, patience_s: float
    ) -> None:
        self._load = load
        self._root = root
        self._patience_s = patience_s
        self._reload: asyncio.Task[ServedModel] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._old: ServedModel | None = None
        self._lock = threading.Lock()
        self._by_name = {model.name: model for model in models}
        if len(self._by_name) != len(models):
            raise ValueError(f"two of the models have one name: {[model.name for model in models]}")
        self.default = models[0].name

    async def start(self) -> None:
        """Starts every engine, one after the other, on the running loop.

        Raises:
            Exception: What a model raised for black pictures; those before it are stopped again.
        """
        async with contextlib.AsyncExitStack() as if_it_fails:
            for model in self.all():
                await model.engine.start()
                if_it_fails.push_async_callback(model.engine.stop)
            if_it_fails.pop_all()

    async def stop(self) -> None:
        """Stops every engine; each finishes what it has."""
        if self._reload is not None:
            await asyncio.wait({self._reload})  # nothing can interrupt one that runs
        if self._old is not None and self._retiring is not None:
            self._let_go(self._old)
            await self._retiring
        for model in self.all():
            await model.engine.stop()

    def all(self) -> list[ServedModel]:
        """Every model, the default first."""
        with self._lock:
            return list(self._by_name.values())

    def get(self, name: str | None = None) -> ServedModel:
        """The model of a name, or the default, as it is now; requests `take` theirs.

        Raises:
            UnknownModel: There is none of the name.
        """
        with self._lock:
            return self._find(name)

    def take(self, name: str | None = None, *, fingerprint: str | None = None) -> ServedModel:
        """A model, which stays as it is until it is given back.

        Args:
            name: None: the first model of the fingerprint; where none is served, the default.
            fingerprint: See `name`.

        Raises:
            UnknownModel: There is none of the name.
        """
        with self._lock:
            model = self._find(name)
            if name is None:
                fitting = (one for one in self._by_name.values() if one.info.fingerprint == fingerprint)
                model = next(fitting, model)
            model.holders += 1
            return model

    def give_back(self, model: ServedModel) -> None:
        """Ends what `take` began."""
        with self._lock:
            model.holders -= 1
            unheld = model._unheld if model.holders == 0 else None
        if unheld is not None:
            unheld()

    async def reload(self, name: str | None = None, path: str | None = None) -> Reloaded:
        """Puts a bundle in a model's place, once it is loaded, checked and warm.

        Requests that hold the old model are answered by it. What fails leaves the old model where it is.

        Args:
            name: Of the model; None for the default.
            path: Of the new bundle, below the root; None: the one that the model has, read again.

        Raises:
            UnknownModel: There is none of the name.
            ModelRefused: The bundle can't be loaded, doesn't reproduce its reference embeddings, or is
                elsewhere.
            ReloadUnderWay: Another one is.
        """
        old = self.get(name)
        place = old.path if path is None else self._below_root(path)
        return await self._begin(old, place, patience_s=self._patience_s)

    async def reload_changed(self) -> None:
        """Reloads every model whose bundle on disk is another by now; what fails is logged."""
        for model in self.all():
            try:
                if replace(read_manifest(model.path), id=model.name) == model.manifest:
                    logger.info("model %r is as it was on disk", model.name)
                    continue
                await self._begin(model, model.path, patience_s=None)
            except (DinoError, ModelRefused, ReloadUnderWay) as error:
                logger.error("model %r was not reloaded: %s", model.name, error)

    @property
    def fingerprints(self) -> set[str]:
        """Of every model."""
        return {model.info.fingerprint for model in self.all()}

    def present(self) -> list[Present]:
        """What metrics say of each at the moment."""
        return [Present(one.info, one.manifest.architecture, one.engine.gauges()) for one in self.all()]

    @property
    def alive(self) -> bool:
        """Whether every engine lives."""
        return all(model.engine.alive for model in self.all())

    @property
    def ready(self) -> bool:
        """Whether every engine would take a request."""
        return all(model.engine.ready for model in self.all())

    @property
    def lost(self) -> bool:
        """Whether an engine lives no more, and never will."""
        return any(model.engine.lost for model in self.all())

    def give_up(self) -> None:
        """Lets every engine answer what it has with an error, at once."""
        for model in [*self.all(), *([self._old] if self._old else [])]:
            model.engine.give_up()

    async def _begin(self, old: ServedModel, path: Path, *, patience_s: float | None) -> Reloaded:
        if self._reload is not None and not self._reload.done():
            raise ReloadUnderWay("a model is being loaded at the moment: wait until that is done")
        if self._retiring is not None and self._old is not None:
            raise ReloadUnderWay(
                f"the model that was replaced last still answers {self._old.holders} requests, and there is "
                "room for one such: wait until they are done"
            )
        before = old.info
        # A task of its own: a caller who leaves doesn't leave half a swap behind.
        self._reload = asyncio.create_task(self._replace(old, path))
        model = await asyncio.shield(self._reload)
        if self._retiring is not None:
            await asyncio.wait({self._retiring}, timeout=patience_s)
        return Reloaded(model, before, old.holders)

    async def _replace(self, old: ServedModel, path: Path) -> ServedModel:
        loop = asyncio.get_running_loop()
        try:
            new = await loop.run_in_executor(None, self._load_beside, old.name, path)
            await new.engine.start()
        except DinoError as error:
            raise ModelRefused(f"{error}; the model before still answers") from None
        except Exception as error:
            logger.exception("model %r could not be loaded from %s", old.name, path)
            raise ModelRefused(
                f"{path.name} could not be loaded or warmed up ({type(error).__name__}; the log says more); "
                "the model before still answers"
            ) from None
        unheld = asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(unheld.set)

        old._unheld = tell
        with self._lock:
            self._by_name[old.name] = new
            if old.holders == 0:
                unheld.set()
        logger.info("model %r is %s now, from %s", new.name, new.info.fingerprint, path)
        self._old = old
        self._retiring = asyncio.create_task(self._retire(old, unheld))
        return new

    def _load_beside(self, name: str, path: Path) -> ServedModel:
        use_native_threads(1)  # the others belong to those who wait for an answer
        return self._load(name, path)

    async def _retire(self, old: ServedModel, unheld: asyncio.Event) -> None:
        """Frees a model once no request holds it."""
        await unheld.wait()
        try:
            await old.engine.stop()
        finally:
            self._old = self._retiring = None
        # Engines and their pipelines know each other, so that only the collector frees them, and it passes
        # over what was frozen when the service had started.
        del old.engine
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _let_go(self, old: ServedModel) -> None:
        if old._unheld is not None:
            old._unheld()

    def _below_root(self, path: str) -> Path:
        if self._root is None:
            raise ModelRefused("this service takes no other bundles: start it with --models-dir")
        root = self._root.resolve()
        try:
            place = (root / path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL in it; links in a circle
            place = root
        if place == root or not place.is_relative_to(root):
            raise ModelRefused(
                f"{path[:200]!r} is not below the directory of bundles, {self._root.name!r} (--models-dir): "
                "name a bundle there"
            )
        return place

    def _find(self, name: str | None) -> ServedModel:
        model = self._by_name.get(self.default if name is None else name)
        if model is None:
            raise UnknownModel(
                f"there is no model {name[:100] if name else name!r}; this service has "
                f"{', '.join(map(repr, self._by_name))}"
            )
        return model
