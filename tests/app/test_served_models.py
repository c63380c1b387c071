"""Models and their places, at moments that a test must choose: a load that waits until it may go on."""

import asyncio
import threading
from pathlib import Path

import pytest

from app.errors import ModelRefused, ReloadUnderWay
from app.inference.config import InferenceConfig
from app.served_models import ServedModel, ServedModels, serve_bundle
from dino_core.bundle import Bundle, load_bundle
from tests.app.running import write_tiny_bundle

CONFIG = InferenceConfig(cores=1, backend="torch")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [load_bundle(write_tiny_bundle(folder / name, seed=seed)) for seed, name in enumerate("ab")]


class Gate:
    """Loads the second bundle, when it may."""

    def __init__(self, bundle: Bundle) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.error: Exception | None = None
        self._bundle = bundle

    def load(self, name: str, path: Path) -> ServedModel:
        self.entered.set()
        assert self.opened.wait(30)
        if self.error is not None:
            raise self.error
        return serve_bundle(self._bundle, CONFIG, name=name)


def made(bundles: list[Bundle], gate: Gate) -> ServedModels:
    return ServedModels([serve_bundle(bundles[0], CONFIG)], load=gate.load, root=None, patience_s=30)


async def until(event: threading.Event) -> None:
    await asyncio.get_running_loop().run_in_executor(None, event.wait, 30)
    assert event.is_set()


def test_of_two_reloads_at_once_the_second_is_refused(bundles: list[Bundle]) -> None:
    gate = Gate(bundles[1])

    async def run() -> None:
        models = made(bundles, gate)
        await models.start()
        first = asyncio.create_task(models.reload())
        await until(gate.entered)
        with pytest.raises(ReloadUnderWay):
            await models.reload()
        gate.opened.set()
        done = await first
        assert done.replaced.fingerprint == bundles[0].manifest.fingerprint
        assert models.get() is done.model
        assert (done.model.name, done.model.info.fingerprint) == ("a", bundles[1].manifest.fingerprint)
        await models.stop()

    asyncio.run(run())


def test_a_caller_who_leaves_leaves_no_half_swap_and_no_closed_door(bundles: list[Bundle]) -> None:
    gate = Gate(bundles[1])

    async def run() -> None:
        models = made(bundles, gate)
        await models.start()
        old = models.get()
        left = asyncio.create_task(models.reload())
        await until(gate.entered)
        left.cancel()
        gate.opened.set()
        while models.get() is old:
            await asyncio.sleep(0.01)
        while True:
            try:
                await models.reload()
                break
            except ReloadUnderWay:  # the old one is being freed
                await asyncio.sleep(0.01)
        await models.stop()

    asyncio.run(run())


def test_a_load_that_breaks_in_an_unforeseen_way_leaves_the_old_model(bundles: list[Bundle]) -> None:
    gate = Gate(bundles[1])
    gate.opened.set()
    gate.error = RuntimeError("no memory at 0xdeadbeef")

    async def run() -> None:
        models = made(bundles, gate)
        await models.start()
        old = models.get()
        with pytest.raises(ModelRefused) as refused:
            await models.reload()
        assert "0xdeadbeef" not in refused.value.title
        assert models.get() is old
        assert models.ready
        gate.error = None
        await models.reload()
        assert models.get() is not old
        await models.stop()

    asyncio.run(run())


def test_a_stop_does_not_wait_for_those_who_hold_an_old_model(bundles: list[Bundle]) -> None:
    gate = Gate(bundles[1])
    gate.opened.set()

    async def run() -> None:
        models = ServedModels([serve_bundle(bundles[0], CONFIG)], load=gate.load, root=None, patience_s=0.01)
        await models.start()
        held = models.take()
        done = await models.reload()
        assert (done.holders, held.engine.ready) == (1, True)
        await asyncio.wait_for(models.stop(), 30)

    asyncio.run(run())
