"""Small pictures of what the teacher sees, at each evaluation of a run: the same few images each time.

RUN/pictures/step-00000500/
    attention.png    one above the other, for networks with attention
    patches.png      the patches' first three principal components as colours, for networks with patches
    neighbours.png   queries and their nearest images
    measures.json    k-NN by class; places on the map of features

Nothing here is random, and nothing changes the training. Of many evaluations a few stay, evenly spread.

Dimension key: N bank images · M queries · B images drawn · D embedding · A heads · Y X patches
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError
from dino_core.knn import weighted_knn
from training.checkpoint import write_synced
from training.components import map_of, patch_colours
from training.evaluation.embedding import embed_pixels
from training.evaluation.measures import TEMPERATURE
from training.evaluation.monitor import Monitor
from training.pictures import attention_strip, neighbour_grid, patch_strip, picture_strip

IMAGES_DRAWN = 4
MOST_KEPT = 8
MOST_BANK, MOST_QUERIES = 1000, 300  # embedded once more for the pictures; small beside the measurement
NEIGHBOURS_SHOWN = 5


class Gallery:
    """The pictures of one run."""

    def __init__(
        self,
        folder: Path,
        monitor: Monitor,
        class_names: Sequence[str],
        *,
        from_step: int,
        say: Callable[[str], None],
    ) -> None:
        """Opens the folder and forgets what came after a step, which a resumed run will do again.

        Args:
            folder: RUN/pictures.
            monitor: Whose images are drawn.
            class_names: What its labels mean; empty without labels.
            from_step: The step that the run goes on from.
            say: Told when a picture cannot be written: no reason to lose a run.
        """
        self._folder, self._say = folder, say
        self._class_names = tuple(class_names) if monitor.queries is not None else ()
        self._bank_NCHW = monitor.bank_NCHW[:MOST_BANK]
        self._bank_labels_N = monitor.bank_labels_N[:MOST_BANK]
        self._queries = monitor.queries
        self.go_back(from_step)

    def go_back(self, step: int) -> None:
        """Forgets what came after a step."""
        for path in hung_in(self._folder):
            if step_of(path) > step:
                shutil.rmtree(path)

    def hang(self, step: int, model: EmbeddingModel) -> None:
        """Draws what a teacher sees; at most `MOST_KEPT` steps stay."""
        if len(self._bank_NCHW) < 2:
            return
        try:
            self._write(step, {**self._maps(model), **self._neighbourhoods(model)})
        except OSError as error:
            self._say(f"the pictures of step {step} are missing: {error.strerror or error}")

    def _write(self, step: int, files: dict[str, bytes]) -> None:
        place = self._folder / f"step-{step:08d}"
        partial = self._folder / f".step-{step:08d}.partial"
        for leftover in (partial, place):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_synced(partial / name, content)
        partial.rename(place)
        hung = hung_in(self._folder)
        for superfluous in thinned([step_of(path) for path in hung], most=MOST_KEPT):
            shutil.rmtree(self._folder / f"step-{superfluous:08d}")

    @torch.no_grad()
    def _maps(self, model: EmbeddingModel) -> dict[str, bytes]:
        """Attention and patches of the first images, as strips."""
        pixels = self._queries.pixels_MCHW if self._queries is not None else self._bank_NCHW
        drawn_BCHW = pixels[:IMAGES_DRAWN]
        on_device = drawn_BCHW.to(next(model.parameters()).device)
        files = {"images.png": picture_strip(drawn_BCHW)}
        features = model.features(on_device)
        height, width = features.grid_hw
        if height * width > 3:
            patches_BPD = features.patches_BND.float().cpu()
            files["patches.png"] = patch_strip(
                patch_colours(patches_BPD).reshape(len(drawn_BCHW), height, width, 3)
            )
        try:
            maps_BAYX = model.attention_maps(on_device)
        except BackboneError:  # a network without attention
            return files
        files["attention.png"] = attention_strip(drawn_BCHW, maps_BAYX.float().cpu().mean(dim=1))
        return files

    def _neighbourhoods(self, model: EmbeddingModel) -> dict[str, bytes]:
        """Neighbours of a few queries; k-NN by class, and the map, as numbers."""
        bank_ND = torch.nan_to_num(embed_pixels(model, self._bank_NCHW))
        measures: dict[str, Any] = {"map": map_of(bank_ND).tolist()}
        if self._queries is None:
            pixels_MCHW, queries_MD = self._bank_NCHW[:IMAGES_DRAWN], bank_ND[:IMAGES_DRAWN]
        else:
            pixels_MCHW = self._queries.pixels_MCHW[:MOST_QUERIES]
            queries_MD = torch.nan_to_num(embed_pixels(model, pixels_MCHW))
            measures["labels"] = self._bank_labels_N.tolist()
            measures["class_names"] = list(self._class_names)
            measures["by_class"] = self._by_class(bank_ND, queries_MD)
        likeness_MN = queries_MD[:IMAGES_DRAWN] @ bank_ND.T
        if self._queries is None:
            likeness_MN.fill_diagonal_(-2)  # an image is no neighbour of its own
        likeness_MN, nearest_MN = likeness_MN.topk(
            min(NEIGHBOURS_SHOWN, len(bank_ND) - (self._queries is None)), dim=1
        )
        own = other = None
        if self._queries is not None:
            own = [self._class_names[label] for label in self._queries.labels_M[:IMAGES_DRAWN].tolist()]
            other = [
                [self._class_names[int(self._bank_labels_N[place])] for place in row]
                for row in nearest_MN.tolist()
            ]
        grid = neighbour_grid(
            list(pixels_MCHW[:IMAGES_DRAWN]),
            [[self._bank_NCHW[place] for place in row] for row in nearest_MN.tolist()],
            query_labels=own,
            neighbour_labels=other,
            scores=likeness_MN.tolist(),
            cell_px=120,
        )
        return {"neighbours.png": grid, "measures.json": json.dumps(measures).encode()}

    def _by_class(self, bank_ND: Tensor, queries_MD: Tensor) -> list[dict[str, Any]]:
        """For each class how many queries there are, and how many of them k-NN gets right."""
        assert self._queries is not None
        labels_M = self._queries.labels_M[: len(queries_MD)]
        ranking_MC = weighted_knn(
            bank_ND,
            self._bank_labels_N,
            queries_MD,
            k=min(20, len(bank_ND)),
            num_classes=len(self._class_names),
            temperature=TEMPERATURE,
        )
        right_M = ranking_MC[:, 0] == labels_M
        return [
            {
                "name": name,
                "images": int((labels_M == place).sum()),
                "right": int(right_M[labels_M == place].sum()),
            }
            for place, name in enumerate(self._class_names)
            if bool((labels_M == place).any())
        ]


def hung_in(folder: Path) -> list[Path]:
    """The steps that have pictures, from the first on."""
    return sorted(folder.glob("step-*"))


def step_of(path: Path) -> int:
    """The step that a folder of pictures belongs to."""
    return int(path.name.removeprefix("step-"))


def thinned(steps: Sequence[int], *, most: int) -> list[int]:
    """Which steps to forget: time and again the one between its neighbours' smallest gap; never the ends."""
    kept = sorted(steps)
    while len(kept) > max(most, 2):
        inner = range(1, len(kept) - 1)
        kept.pop(min(inner, key=lambda place: kept[place + 1] - kept[place - 1]))
    return sorted(set(steps) - set(kept))
