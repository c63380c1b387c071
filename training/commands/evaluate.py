"""`dino-train eval`: what an embedding is worth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console
from rich.progress import Progress

from dino_core.bundle import read_manifest
from dino_core.manifest import MANIFEST
from dino_core.multiscale import MultiScale
from training.commands.parsing import COMMAND, Device
from training.data.images import Images
from training.data.opening import open_split
from training.errors import ConfigError
from training.evaluation.baselines import PerceptualHash, RawPixels, starting_weights, untrained
from training.evaluation.copies import Copies, embed_copies, find_copies, read_copies
from training.evaluation.embedding import Embedder, save_embeddings
from training.evaluation.folder import embed_folder, evaluate_folder
from training.evaluation.models import NamedModel, model_named
from training.evaluation.plot import bars
from training.evaluation.quantising import quantised
from training.evaluation.report import ModelReport, as_json, compared
from training.evaluation.robustness import robustness
from training.evaluation.tables import as_markdown, as_rich, sections
from training.loop import choose_device


class EvalSettings(BaseSettings):
    """Measure models side by side: k-NN, linear probe, retrieval, copies, robustness, smaller embeddings."""

    model_config = COMMAND

    models: CliPositionalArg[list[str]]
    """Bundles (models/NAME), runs (runs/NAME), checkpoints, or timm:NAME; the first is compared with all."""
    data: Path | None = None
    """Folder of images; val/ is measured by train/ if it has both, else each tenth by the rest."""
    copies: Path | None = None
    """Folder of changed copies and their originals, with groundtruth.csv (query,original,attack)."""
    scales: tuple[float, ...] = ()
    """Average the models' embeddings at these sizes, as shares of their own, such as 0.71,1,1.41; the first
    model at its own size stands beside them."""
    untrained: bool = False
    """Random weights in place of the published ones, for timm:NAME."""
    baselines: bool = True
    """Beside the models: raw pixels, a perceptual hash, and the first model untrained and at its start."""
    robustness: int = Field(default=200, ge=0)
    """How many pictures of --data to compress and shrink; 0 for none."""
    quantise: bool = True
    """Measure int8 and binary embeddings too."""
    json_file: Path | None = None
    """Where to write everything as JSON."""
    card: Path | None = None
    """Where to write the tables as Markdown, for a model card."""
    plot: Path | None = None
    """Where to draw bars with intervals, a PNG."""
    embeddings: Path | None = None
    """Where to write the vectors of all images of --data with their paths, .npz or .safetensors."""
    batch_size: int = Field(default=64, ge=1)
    """Images that go through the network together."""
    workers: int | None = None
    """Threads that decode; one for each core if not given."""
    device: Device = "auto"
    """Where the network runs."""


def eval_command(settings: EvalSettings, console: Console) -> None:
    """Measures models, and prints tables."""
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
    beside, remarks = _beside(models[0], settings, device) if settings.baselines else ([], [])
    reports = [_measured(named, split, copies, settings) for named in models]
    reports += [_measured(named, split, copies, settings, is_baseline=True) for named in beside]
    comparisons = compared(reports)
    tables = sections(reports, comparisons)
    if settings.json_file is not None:
        results = as_json(
            reports, comparisons, data=_name_of(settings.data), copies=_name_of(settings.copies)
        )
        settings.json_file.write_text(json.dumps(results, indent=1))
    if settings.card is not None:
        settings.card.write_text(as_markdown(tables))
    if settings.plot is not None:
        settings.plot.write_bytes(bars(reports))
    console.print(as_rich(tables, width=console.width))
    skipped = {name: reason for report in reports for name, reason in report.skipped.items()}
    remarks += [remark for report in reports for remark in report.remarks]
    for sentence in [*remarks, *(f"left out {name}: {reason}" for name, reason in skipped.items())]:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _beside(
    first: NamedModel, settings: EvalSettings, device: torch.device
) -> tuple[list[NamedModel | tuple[str, Embedder]], list[str]]:
    """What stands beside the models, and what should and can't."""
    # With several sizes the question is what they add to one.
    beside: list[NamedModel | tuple[str, Embedder]] = [first] if settings.scales else []
    remarks = []
    bundle = Path(settings.models[0])
    if (bundle / MANIFEST).is_file():
        start = starting_weights(read_manifest(bundle).provenance, bundle, device=device)
        if isinstance(start, NamedModel):
            beside.append(start)
        elif start is not None:
            remarks.append(start)
    if not settings.untrained:
        beside.append(untrained(first))
    if first.model.preprocessing.planes is not None:
        remarks.append(
            "raw pixels, pHash and changed queries are left out: they are of RGB pictures, and these are "
            "channels of other kinds"
        )
        return beside, remarks
    return [*beside, ("raw pixels", RawPixels()), ("pHash", PerceptualHash())], remarks


def _measured(
    what: NamedModel | tuple[str, Embedder],
    split: tuple[Images, Images | None] | None,
    copies: Copies | None,
    settings: EvalSettings,
    *,
    is_baseline: bool = False,
) -> ModelReport:
    scales = settings.scales if not is_baseline else ()
    name, model = _embedder(what, scales)
    found: dict[str, Any] = {}
    total = sum(len(images) for images in split or () if images is not None)
    total += settings.robustness if split is not None else 0
    total += len(copies.images) if copies is not None else 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"embedding with {name}", total=total)
        how: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers}
        how["on_progress"] = _advancing(progress, task)
        measures, labelled, of_copies = {}, None, None
        if split is not None:
            folder = embed_folder(model, *split, **how)
            if settings.embeddings is not None and not is_baseline:
                save_embeddings(settings.embeddings, folder.names, folder.features_ND)
            # Thousands of raw pixels would take the probe longer than all else together.
            report = evaluate_folder(folder, probe=isinstance(what, NamedModel))
            labelled, measures = folder.labelled, dict(report.means)
            found |= {"kind": report.kind, "by_class": report.by_class, "spread": report.spread}
            found |= {"images": len(folder.names), "skipped": folder.skipped}
            changed = settings.robustness if model.preprocessing.planes is None else 0
            queries, gallery_ND, gallery_labels_N = folder.queries(changed)
            if queries.places:
                found["robustness"] = robustness(model, queries, gallery_ND, gallery_labels_N, **how)
        if copies is not None:
            of_copies = (copies, embed_copies(model, copies, **how))
            copy_report = find_copies(of_copies[1], copies)
            measures |= copy_report.measures
            found["by_attack"] = copy_report.by_attack
        if settings.quantise and not is_baseline:
            found["forms"] = quantised(labelled, of_copies)
    return ModelReport(
        name=name,
        is_baseline=is_baseline,
        # A bundle's fingerprint is that of its vectors at its own size.
        fingerprint=what.fingerprint if isinstance(what, NamedModel) and not scales else None,
        dimensions=model.dimensions,
        remarks=what.remarks if isinstance(what, NamedModel) else (),
        measures=measures,
        **found,
    )


def _embedder(what: NamedModel | tuple[str, Embedder], scales: tuple[float, ...]) -> tuple[str, Embedder]:
    if not isinstance(what, NamedModel):
        return what
    if not scales:
        return what.name, what.model
    sizes = MultiScale(what.model, scales)
    return f"{what.name} at {', '.join(map(str, sizes.sides_px))} px", sizes


def _name_of(folder: Path | None) -> str | None:
    """Its last part: results say which data, and nothing of the machine."""
    return None if folder is None else folder.resolve().name


def _advancing(progress: Progress, task: Any) -> Callable[[int], None]:  # noqa: ANN401  rich's own kind of number
    return lambda count: progress.advance(task, count)
