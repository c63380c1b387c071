"""Where on this machine is kept what can be made again."""

import os
from pathlib import Path


def users_cache() -> Path | None:
    """Dinoserve's directory in the user's cache, which may not be there yet; None where there is no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "dinoserve"
