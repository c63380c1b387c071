"""uvicorn, and how it ends.

    SIGTERM ─► not ready, still answering ─► no new connections, finishing ─► 503 to the rest ─► exit 0
               for the lame-duck time        for the drain time

A load balancer asks whether the service is ready now and then, and sends it requests until it has noticed:
hence the lame-duck time. Ctrl-C does without it, and a second signal ends the process at once. Where a thread
of an engine has died, the process ends by itself with status 1, for its supervisor to start another.
"""

import asyncio
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn

from app.api.state import Departure
from app.served_models import ServedModels

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves an app until it is told to end, or an engine is lost.

    Args:
        config: Of uvicorn, with the app.
        models: That the app starts and stops.
        departure: That the app tells its callers of.
        lame_duck_s: From SIGTERM to the last new connection.
        drain_s: From there to the last answer.

    Attributes:
        lost: Whether it ended for a lost engine.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        models: ServedModels,
        departure: Departure,
        lame_duck_s: float,
        drain_s: float,
    ) -> None:
        super().__init__(config)
        self.lost = False
        self._models = models
        self._departure = departure
        self._lame_duck_s = lame_duck_s
        self._drain_s = drain_s
        self._leaves_at_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to leave; at the second signal, ends the process as the signal does by itself."""
        if self._departure.leaving:
            logger.warning("ended at once by a second signal; requests under way are lost")
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._departure.leaving = True
        stays_s = self._lame_duck_s if sig == signal.SIGTERM else 0.0
        self._leaves_at_s = time.monotonic() + stays_s
        logger.info("%s: not ready any more; answers for %g s yet", signal.Signals(sig).name, stays_s)

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to shut down; uvicorn asks ten times a second."""
        if self._models.lost and not self.lost:
            logger.critical(
                "a thread of an engine has died, see above: this process ends, to be started again"
            )
            self.lost = self._departure.leaving = self.should_exit = True
        if self._leaves_at_s is not None and time.monotonic() >= self._leaves_at_s:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, waits for answers as long as there is time, and stops the app."""
        self._departure.leaving = True
        asyncio.get_running_loop().call_later(self._drain_s, self._models.give_up)
        await super().shutdown(sockets)
