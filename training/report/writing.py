"""A run directory -> one page that holds everything itself: no network, no script, readable on a phone."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from training.checkpoint import write_synced
from training.errors import DataError
from training.report.charts import bar_chart, point_map
from training.report.gallery import hung_in, step_of
from training.report.guide import GUIDE
from training.report.page import STYLE
from training.report.panels import curves_of
from training.report.preview import PREVIEW_FILE
from training.report.story import Story, read_story

REPORT_FILE = "report.html"
_MOST_LISTED = 100
_OVER_TIME = (
    ("attention.png", "Where the class token looks"),
    ("patches.png", "Patches: first three principal components as colours"),
)


def report_at_the_end(run_dir: Path, console: Console) -> None:
    """Writes the report of a run that ends, however it ends; one that fails is said, and costs no run."""
    try:
        path = write_report(run_dir)
    except Exception as error:
        console.print(f"there is no report: {error}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, finished or not.

    Args:
        run_dir: Of the run.
        out: Where the page goes; report.html in the run directory if not given.

    Returns:
        The page.

    Raises:
        RunDirectoryError: There is no run.
        DataError: The page cannot be written.
    """
    path = out or run_dir / REPORT_FILE
    page = page_of(read_story(run_dir))
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_synced(partial, page.encode("utf-8", "replace"))  # file names may hold bytes that are no text
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): give --out another file") from error
    return path


def page_of(story: Story) -> str:
    """The whole page."""
    sections = (
        ("Curves", curves_of(story)),
        ("What the network sees", _picture(story.run_dir / PREVIEW_FILE, "augmented views")),
        ("What the teacher sees, over time", _over_time(story.run_dir)),
        ("Neighbours, classes and map", _neighbourhoods(story.run_dir)),
        ("What the numbers mean", GUIDE),
        ("The recipe", _recipe(story)),
        ("The data", _data(story)),
    )
    name = escape(story.run_dir.resolve().name)
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{name}</h1>{_verdict(story)}{body}</main></body></html>\n"
    )


def _verdict(story: Story) -> str:
    verdict = story.verdict
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences)
    return f'<div class="verdict {verdict.state}"><b>{verdict.state}</b>{sentences}</div>'


def _picture(path: Path, words: str) -> str:
    """A PNG as part of the page, in a box that scrolls for itself; nothing where there is no file."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<div class="wide"><img alt="{escape(words, quote=True)}" src="data:image/png;base64,{data}"></div>'
    )


def _over_time(run_dir: Path) -> str:
    """A strip for each step, side by side, the images themselves first."""
    steps = hung_in(run_dir / "pictures")
    return "".join(_strips(steps, file, title) for file, title in _OVER_TIME)


def _strips(steps: Sequence[Path], file: str, title: str) -> str:
    shown = [step for step in steps if (step / file).is_file()]
    if not shown:
        return ""
    columns = [("image", shown[-1] / "images.png")]
    columns += [(f"step {step_of(step):,}", step / file) for step in shown]
    cells = "".join(
        f"<figure><figcaption>{words}</figcaption>{_picture(path, f'{title}, {words}')}</figure>"
        for words, path in columns
    )
    return f'<h3>{title}</h3><div class="strips">{cells}</div>'


def _neighbourhoods(run_dir: Path) -> str:
    """The last step's neighbours, k-NN by class and map."""
    steps = hung_in(run_dir / "pictures")
    if not steps:
        return ""
    last = steps[-1]
    when = f"step {step_of(last):,}"
    grid = _picture(last / "neighbours.png", "queries and their nearest images")
    parts = [f"<h3>Queries and their nearest images, {when}</h3>{grid}"] if grid else []
    measures = _measures(last)
    figures = list(_measured(measures, when))
    parts += [f'<div class="charts">{"".join(figures)}</div>'] if figures else []
    return "".join(parts)


def _measured(measures: Mapping[str, Any], when: str) -> Iterator[str]:
    if by_class := measures.get("by_class"):
        yield bar_chart(
            f"k-NN by class, {when}",
            [
                (each["name"], each["right"] / each["images"], f"{each['right']} of {each['images']}")
                for each in by_class
            ],
        )
    if points := measures.get("map"):
        yield point_map(
            f"Map of the embeddings (two principal components), {when}",
            [(x, y) for x, y in points],
            measures.get("labels", []),
            measures.get("class_names", []),
        )


def _measures(step: Path) -> dict[str, Any]:
    path = step / "measures.json"
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found


def _recipe(story: Story) -> str:
    """Every setting in its final value, with its reason where the recipe gives one."""
    reasons = story.saved.get("reasons") or story.config.get("reasons") or {}
    reasons = reasons if isinstance(reasons, dict) else {}
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td>"
        f"<td>{escape(str(reasons.get(name, '')))}</td></tr>"
        for name, value in _flat(story.config)
    )
    head = "<tr><th>setting</th><th>value</th><th>reason</th></tr>"
    table = f'<div class="wide"><table>{head}{rows}</table></div>'
    return f"<details{' open' if reasons else ''}><summary>All settings</summary>{table}</details>"


def _data(story: Story) -> str:
    parts = [f"<p>Images: {escape(str(story.saved.get('data', 'unknown')))}</p>"]
    if story.skipped:
        parts.append(f"<h3>{len(story.skipped)} files were left out</h3>{_table(story.skipped)}")
    if story.data_check:
        parts.append(f"<h3>Check of the data</h3>{_table(dict(_flat(story.data_check)))}")
    return "".join(parts)


def _table(values: Mapping[str, Any]) -> str:
    listed = list(values.items())[:_MOST_LISTED]
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>" for key, value in listed
    )
    more = f"<p>… and {len(values) - len(listed):,} more</p>" if len(values) > len(listed) else ""
    return f'<div class="wide"><table>{rows}</table></div>{more}'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names with dots, and values as text."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif name != "reasons":
            yield name, value if isinstance(value, str) else json.dumps(value)
