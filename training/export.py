"""The teacher of a run -> a bundle that says what it is.

Only the teacher's backbone is exported: the head served the objective, and the student is behind its teacher.
"""

import copy
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dino_core.backbones import Backbone
from dino_core.bundle import Manifest, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.manifest import WEIGHTS
from training.checkpoint import load_checkpoint
from training.config import RunConfig
from training.data.addresses import name_of
from training.errors import ConfigError
from training.pictures import Panel, curves
from training.rundir import RunDirectory, read_plan
from training.runlog import read_metrics
from training.state import TrainState


def teacher_model(state: TrainState, config: RunConfig) -> EmbeddingModel:
    """The teacher as the service will run it, on the run's device; shares the teacher's weights."""
    backbone = state.teacher.backbone
    assert isinstance(backbone, Backbone)  # `new_state` makes no other
    return EmbeddingModel(
        backbone,
        preprocessing=config.preprocessing(),
        pooling=config.backbone.pooling or backbone.default_pooling,
    )


def export_teacher(
    state: TrainState,
    config: RunConfig,
    out: Path,
    *,
    directory: RunDirectory | None,
    data: Mapping[str, Any],
) -> Manifest:
    """Writes the teacher as a verified bundle.

    Args:
        state: Of the run, or from a checkpoint.
        config: Of the run.
        out: Where the bundle goes; its name is the model's id.
        directory: Of the run, for its measurements; none if only the checkpoint is left.
        data: What it was trained on: `name`, `images`, `classes`, `skipped`.

    Raises:
        ConfigError: Something else is there.
        BundleError: What was written does not load again; nothing is put in place then.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: give --out another name, or move the old bundle away")
    lines = read_metrics(directory.metrics) if directory is not None else []
    lines = [line for line in lines if line["step"] <= state.step]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    model = copy.deepcopy(teacher_model(state, config))
    model.to("cpu").to(memory_format=torch.contiguous_format)
    provenance: dict[str, object] = {
        "method": "DINO self-distillation",
        "recipe": config.recipe,
        "config": config.model_dump(mode="json"),
        "steps": state.step,
        "images_seen": state.step * config.batch_size,
        "data": dict(data),
        "seed": config.seed,
        "adapted_from": _origin(config),
        "metrics": {
            "untrained" if config.backbone.weights is None else "start": evaluations[0],
            "teacher": evaluations[-1],
        }
        if len(evaluations) > 1
        else {},
        "versions": {name: version(name) for name in ("dinoserve", "torch", "timm")}
        | {"python": platform.python_version()},
    }
    assets = {"curves.png": _curves(lines, config)} if lines else {}
    return write_bundle(
        out,
        model,
        provenance=provenance,
        card=model_card(
            out.name, config, state.step, data=data, evaluations=evaluations, with_curves=bool(assets)
        ),
        assets=assets,
    )


def holds_teacher(out: Path, state: TrainState) -> bool:
    """Whether the weights of a bundle that is there are those of the teacher, bit for bit."""
    if not (out / WEIGHTS).is_file():
        return False
    found = load_file(out / WEIGHTS)
    own = state.teacher.backbone.get_submodule("network").state_dict()
    return found.keys() == own.keys() and all(
        torch.equal(found[name], tensor.cpu()) for name, tensor in own.items()
    )


def export_checkpoint(checkpoint: Path, out: Path) -> Manifest:
    """Writes the teacher of any checkpoint as a bundle.

    Raises:
        CheckpointError: It is no whole checkpoint.
        ConfigError: There is something at `out`.
    """
    state, config = load_checkpoint(checkpoint, device=torch.device("cpu"))
    run_dir = checkpoint.resolve().parent.parent
    directory = RunDirectory(run_dir) if (run_dir / "config.json").exists() else None
    name = name_of(read_plan(run_dir).data) if directory is not None else "unknown"
    return export_teacher(state, config, out, directory=directory, data={"name": name})


def model_card(
    name: str,
    config: RunConfig,
    steps: int,
    *,
    data: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    with_curves: bool,
) -> str:
    """The bundle's README: what it is, what it was measured to do, and what it is not for."""
    images = f"{data['images']:,} images" if "images" in data else "images"
    came_from = _origin(config)
    origin = (
        f"\n| adapted from | {' '.join(f'`{word}`' for word in came_from.values())} |" if came_from else ""
    )
    how = (
        "An image embedding: weights that were there before, for which labels may have been used, adapted\n"
        "without labels by"
        if came_from
        else "An image embedding, learnt without labels by"
    )
    start = "the weights as they came" if came_from else "the same network untrained"
    terms = ", and as the weights that they were adapted from" if came_from else ""
    curves_part = "\n![Loss and k-NN accuracy over the run](curves.png)\n" if with_curves else ""
    return f"""# {name}

{how} DINO self-distillation (Caron et al. 2021,
https://arxiv.org/abs/2104.14294) with dinoserve. The weights are the teacher's backbone.

| | |
|---|---|
| network | `{config.backbone.name}` (timm), trained at {config.crops.global_px} px |
| input | {_input(config)} |
| data | {images} of `{data.get("name", "unknown")}`{_classes(data)}; labels were not used |
| recipe | `{config.recipe}`, {steps:,} steps of {config.batch_size} images, seed {config.seed} |{origin}

Use it: `{_use(name, config)}`, or without dinoserve
`timm.create_model("local-dir:models/{name}", pretrained=True)`.

## Measured
{_measured(evaluations, start=start)}{curves_part}
Every setting of the run is in `manifest.json` under `provenance`.

## Limits
- It knows what its training images show, and little else. Measure it on your own pictures with
  `dino-train eval models/{name} --data DIR` before you rely on it.
- Similar means similar to this network: colours, textures and backgrounds count as well as objects.
- Whatever is over- or under-represented in the training images is so in its judgements. Do not use it to
  decide about people.

## Licence
The weights are as free as the images that they were trained on{terms}: see the terms of those. The code that
made them is Apache-2.0.
"""


def _origin(config: RunConfig) -> dict[str, str] | None:
    """The weights that the run began with: the last part of their name, and which ones exactly."""
    weights, fingerprint = config.backbone.weights, config.backbone.weights_fingerprint
    if weights is None:
        return None
    name = {"name": weights.rstrip("/").rpartition("/")[2]}
    return {**name, "fingerprint": fingerprint} if fingerprint else name


def _input(config: RunConfig) -> str:
    """What becomes of an image before the network: its size, and its channels where it is no RGB picture."""
    size, planes = config.preprocessing(), config.planes()
    sides = f"shorter side to {size.resize_px} px (bicubic), centre crop {size.crop_px} px"
    if planes is None:
        return sides
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in zip(planes.low, planes.high, strict=True))
    return f"{sides}; {planes.channels} channels, scaled to 8 bits from {ranges}"


def _use(name: str, config: RunConfig) -> str:
    if config.planes() is None:
        return f"dino-serve run --model models/{name}"
    return f"dino-train eval models/{name} --data DIR"


def _measured(evaluations: Sequence[Mapping[str, Any]], *, start: str) -> str:
    if len(evaluations) < 2:
        return "Nothing was measured during the run: see `dino-train eval`.\n"
    first, last = evaluations[0], evaluations[-1]
    rows = [
        ("effective dimensions (RankMe)", "rank_me", ".1f"),
        ("spread (0 is collapse)", "feature_std", ".3f"),
    ]
    sentence = ""
    if "knn_percent" in last:
        rows.insert(0, (f"k-NN accuracy in %, k = {last['knn_k']}", "knn_percent", ".1f"))
        which = {
            "val": "{queries} held-out validation images, each classified by {bank} training images",
            "seen": "{queries} training images (seen, without labels), each classified by {bank} others",
        }[last["knn_kind"]]
        sentence = f"\nk-NN: {which.format(queries=last['knn_queries'], bank=last['knn_bank'])}; T = 0.07.\n"
    table = "\n".join(
        f"| {title} | {first[key]:{form}} | **{last[key]:{form}}** |"
        for title, key, form in rows
        if key in first and key in last
    )
    return f"| | {start} | this teacher |\n|---|---|---|\n{table}\n{sentence}"


def _classes(data: Mapping[str, Any]) -> str:
    return f" in {data['classes']} folders" if data.get("classes") else ""


def _curves(lines: Sequence[Mapping[str, Any]], config: RunConfig) -> bytes:
    """The run in four diagrams, with the steps at which its schedules turn."""
    turns = {
        config.optimizer.freeze_last_layer_steps: "last layer thaws",
        config.optimizer.warmup_steps: "learning rate at its peak",
        config.loss.teacher_temperature_warmup_steps: "temperature at its end",
    }
    return curves(
        lines,
        [
            Panel(
                "Loss = entropy + KL, nats",
                {"loss": "loss_nats", "teacher entropy": "teacher_entropy_nats"},
                ("ln K", math.log(config.head.num_prototypes)),
            ),
            Panel("KL, nats: what is left to learn", {"KL": "kl_nats"}),
            Panel("k-NN accuracy of the teacher, %", {"k-NN": "knn_percent"}),
            Panel("Effective dimensions (RankMe)", {"RankMe": "rank_me"}),
        ],
        events={step: words for step, words in turns.items() if step > 0},
    )
