"""`dino-train eval`: what an embedding is worth."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.commands.parsing import COMMAND, Device
from training.data.addresses import Where
from training.data.images import Images
from training.data.opening import open_split
from training.errors import ConfigError
from training.evaluation.copies import Copies, embed_copies, find_copies, read_copies
from training.evaluation.embedding import save_embeddings
from training.evaluation.folder import evaluate_folder
from training.evaluation.intervals import Estimate
from training.evaluation.models import NamedModel, model_named
from training.loop import choose_device


class EvalSettings(BaseSettings):
    """Measure models side by side: k-NN, linear probe, retrieval, copy detection, spread, rank."""

    model_config = COMMAND

    models: CliPositionalArg[list[str]]
    """Bundles (models/NAME), runs (runs/NAME), checkpoints, or timm:NAME."""
    data: Where | None = None
    """Folder of images; val/ is measured by train/ if it has both, else each tenth by the rest."""
    copies: Path | None = None
    """Folder of changed copies and their originals, with groundtruth.csv (query,original,attack)."""
    untrained: bool = False
    """Random weights in place of the published ones, for timm:NAME."""
    json_file: Path | None = None
    """Where to write the results as JSON too."""
    markdown: Path | None = None
    """Where to write the table as Markdown too."""
    embeddings: Path | None = None
    """Where to write the vectors of all images of --data with their paths, .npz or .safetensors."""
    batch_size: int = Field(default=64, ge=1)
    """Images that go through the network together."""
    workers: int | None = None
    """Threads that decode; one for each core if not given."""
    device: Device = "auto"
    """Where the network runs."""


def eval_command(settings: EvalSettings, console: Console) -> None:
    """Measures models, and prints a table."""
    if settings.data is None and settings.copies is None:
        raise ConfigError("measure on what? Give --data DIR, a folder of images, or --copies DIR, or both")
    if settings.embeddings is not None and (len(settings.models) > 1 or settings.data is None):
        raise ConfigError(
            "--embeddings writes the vectors of one model on --data: give one model, and a folder"
        )
    device = choose_device(settings.device)
    split = open_split(settings.data) if settings.data is not None else None
    copies = read_copies(settings.copies) if settings.copies is not None else None
    # All are loaded before the first is measured: a slip of the pen in the last costs nothing then.
    models = [model_named(what, device=device, untrained=settings.untrained) for what in settings.models]
    results = [_measured(named, split, copies, settings) for named in models]
    if settings.json_file is not None:
        settings.json_file.write_text(json.dumps({"models": results}, indent=1))
    rows = table_rows(results)
    if settings.markdown is not None:
        settings.markdown.write_text(as_markdown(rows))
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    for remark in {remark: None for result in results for remark in result["remarks"]}:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    for name, reason in {
        name: reason for result in results for name, reason in result["skipped"].items()
    }.items():
        console.print(f"left out {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def table_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each measure and a column for each model, with 95 % intervals."""
    rows = [["measure", *(result["model"] for result in results)]]
    rows.append(["images", *(str(result["images"]) for result in results)])
    rows.append(["measured", *(result["kind"] for result in results)])
    for name in dict.fromkeys(name for result in results for name in result["measures"]):
        found = (result["measures"].get(name) for result in results)
        rows.append([name, *("" if one is None else in_words(one) for one in found)])
    for name in dict.fromkeys(name for result in results for name in result["spread"]):
        values = (result["spread"].get(name) for result in results)
        rows.append([name, *("" if value is None else f"{value:.2f}" for value in values)])
    for name in dict.fromkeys(name for result in results for name in result["copies_by_attack"]):
        shares = (result["copies_by_attack"][name]["p_at_1"] for result in results)
        rows.append([f"copies, {name}", *map(in_words, shares)])
    return rows


def in_words(estimate: Mapping[str, float]) -> str:
    """A number with its interval."""
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}–{estimate['high']:.1f}]"


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table for a model card."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _measured(
    named: NamedModel,
    split: tuple[Images, Images | None] | None,
    copies: Copies | None,
    settings: EvalSettings,
) -> dict[str, Any]:
    total = sum(len(images) for images in split or () if images is not None)
    total += len(copies.images) if copies is not None else 0
    result: dict[str, Any] = {
        "model": named.name,
        "fingerprint": named.fingerprint,
        "remarks": list(named.remarks),
        "images": 0,
        "kind": "",
        "measures": {},
        "by_class": {},
        "spread": {},
        "copies_by_attack": {},
        "skipped": {},
    }
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"embedding with {named.name}", total=total)
        how: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers}
        how["on_progress"] = _advancing(progress, task)
        if split is not None:
            report = evaluate_folder(named.model, *split, **how)
            result |= {"images": report.images, "kind": report.kind, "spread": report.spread}
            result |= {"measures": _json(report.means), "by_class": _json(report.by_class)}
            result["skipped"] = report.skipped
            if settings.embeddings is not None:
                save_embeddings(settings.embeddings, report.names, report.features_ND)
        if copies is not None:
            found = find_copies(embed_copies(named.model, copies, **how), copies)
            result["measures"] |= _json(found.measures)
            result["copies_by_attack"] = {attack: _json(one) for attack, one in found.by_attack.items()}
    return result


def _json(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in estimates.items()}


def _advancing(progress: Progress, task: Any) -> Callable[[int], None]:  # noqa: ANN401  rich's own kind of number
    return lambda count: progress.advance(task, count)
