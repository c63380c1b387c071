"""What became of pictures: counted, shown while it happens, and each failure named in a file at once."""

import contextlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from app.settings import SettingsInvalid
from app.sources.picture import FailedPicture, clean

DEFAULT_REPORT: Final = Path("index-failures.jsonl")
_SHOWN_FAILURES: Final = 5


class Report:
    """JSON lines, one for each failure, written as it happens: also a run that is killed has named its own.

    Attributes:
        path: Of the file. It is there if something failed; one of an earlier run goes if nothing does.
        counts: "added", "updated", "unchanged" and "failed".
        problem: Why failures could not be written; None as long as they could.

    Raises:
        SettingsInvalid: The file could not be written.
    """

    def __init__(self, path: Path = DEFAULT_REPORT) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first_failures: list[FailedPicture] = []
        self.problem: str | None = None
        self._file: io.TextIOWrapper | None = None
        place = path if path.exists() else path.absolute().parent
        if path.is_dir() or not os.access(place, os.W_OK):
            raise SettingsInvalid(f"the report {path} can't be written: name another with --report")

    @property
    def exit_code(self) -> int:
        """0 if every picture is there now, else 1."""
        return 1 if self.counts["failed"] else 0

    def count(self, status: str) -> None:
        """Takes note of a picture that is there now."""
        self.counts[status] += 1

    def fail(self, failed: FailedPicture) -> None:
        """Takes note of a failure."""
        self.counts["failed"] += 1
        if len(self.first_failures) < _SHOWN_FAILURES:
            self.first_failures.append(failed)
        line = {
            "id": clean(failed.id),
            "path": clean(failed.where),
            "code": failed.failure.code,
            "title": failed.failure.title,
        }
        try:
            if self._file is None:
                self._file = self.path.open("w", encoding="utf-8", buffering=1)
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            self.problem = f"the report {self.path} can't be written: {error.strerror}"

    def finish(self, console: Console) -> None:
        """Closes the file, and says what there is to say."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        counts = ", ".join(
            f"{self.counts[name]:,} {name}" for name in ("added", "updated", "unchanged", "failed")
        )
        console.print(counts, highlight=False)
        if not self.counts["failed"]:
            with contextlib.suppress(OSError):
                self.path.unlink()
            return
        for failed in self.first_failures:
            text = f"  {clean(failed.where)}: {failed.failure.title}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        last = self.problem or f"All {self.counts['failed']:,} failures are in {self.path}"
        console.print(last, markup=False, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Pictures per second."""

    def render(self, task: Task) -> Text:
        """The mean so far, as text. Rich's own speed leaves the first batch out, which may be half of all."""
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:,.1f} images/s" if seconds else "")


def progress_bar(console: Console) -> Progress:
    """A bar with counts, speed and the time that is left; its tasks have a field `failed`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=console,
    )
