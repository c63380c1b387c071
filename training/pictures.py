"""Pictures for people, each a function from tensors to PNG bytes: neighbours, views, attention, curves.

Grids are drawn by Pillow at the pixels' own size, curves by matplotlib's figure objects; no display and no
global state is touched. Letters are large against the pictures, so that they can still be read at the width
of a phone.

Dimension key: B images · C channels · H W pixels · A attention heads · Y X patches
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dino_core.heatmap import heat_over

_PAPER = (255, 255, 255)
_INK = (31, 35, 40)
_FAINT = (110, 119, 129)
_RIGHT = (26, 127, 55)
_WRONG = (207, 34, 46)
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 13,
    "handlelength": 1.2,
    "columnspacing": 1.0,
    "handletextpad": 0.4,
    "borderaxespad": 0.2,
}
_SERIES = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700")


def neighbour_grid(
    queries: Sequence[Tensor],
    neighbours: Sequence[Sequence[Tensor]],
    *,
    query_labels: Sequence[str] | None = None,
    neighbour_labels: Sequence[Sequence[str]] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    cell_px: int = 160,
) -> bytes:
    """One row for each query: the query, a gap, its neighbours from the nearest on.

    With labels, a neighbour of the query's class has a green bar, another a red bar and its own class's
    name; so the picture can be read without colours too.

    Args:
        queries: uint8 [3, H, W], any sizes; shown whole, on white.
        neighbours: As many lists as queries, all of one length.
        query_labels: A class name for each query.
        neighbour_labels: A class name for each neighbour.
        scores: A cosine for each neighbour.
        cell_px: Side of a picture.

    Returns:
        A PNG.

    Raises:
        ValueError: The lists don't have the same lengths.
    """
    lengths = {len(row) for row in neighbours}
    if not queries or len(queries) != len(neighbours) or len(lengths) != 1:
        raise ValueError(f"{len(queries)} queries need {len(queries)} lists of neighbours, all of one length")
    columns = lengths.pop() + 1
    has_text = query_labels is not None or scores is not None
    sheet = _Sheet(len(queries), [cell_px] * columns, cell_px=cell_px, captions=has_text, heads=1)
    for column, words in enumerate(["query", "nearest", *map(str, range(2, columns))][:columns]):
        sheet.head(column, words)
    for row, (query, found) in enumerate(zip(queries, neighbours, strict=True)):
        own_label = query_labels[row] if query_labels else ""
        sheet.place(_picture(query), row, 0, caption=own_label)
        for column, image in enumerate(found):
            words = f"{scores[row][column]:.2f}" if scores else ""
            colour = None
            if query_labels and neighbour_labels:
                label = neighbour_labels[row][column]
                colour = _RIGHT if label == own_label else _WRONG
                words = words if label == own_label else f"{words} {label}".strip()
            sheet.place(_picture(image), row, column + 1, caption=words, colour=colour)
    return sheet.png()


def augmentation_preview(  # noqa: PLR0913  a picture has many parts
    views: Sequence[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    originals: Tensor | None = None,
    names: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    most_images: int = 6,
    cell_px: int = 144,
) -> bytes:
    """What the networks see: one row for each image, the original first, then every view.

    Args:
        views: From `dino_core.augment.augment`, float [B, C, H, W] each, normalised.
        mean: With which they were normalised.
        std: With which they were normalised.
        originals: uint8 canvases [B, C, H, W].
        names: What each view is called, above its size.
        notes: For each view and image what was done to it, written under it.
        most_images: Rows at most.
        cell_px: Side of the largest view; smaller views are drawn smaller, down to a half.

    Returns:
        A PNG.
    """
    rows = min(len(views[0]), most_images)
    largest_px = max(view.shape[-1] for view in views)
    sides_px = [max(round(cell_px * view.shape[-1] / largest_px), cell_px // 2) for view in views]
    first = 0 if originals is None else 1
    sheet = _Sheet(
        rows,
        [cell_px] * first + sides_px,
        cell_px=cell_px,
        heads=1 if names is None else 2,
        notes=max((len(note.splitlines()) for column in notes or () for note in column), default=0),
        first_apart=originals is not None,
    )
    if originals is not None:
        sheet.head(0, "image")
        for row in range(rows):
            sheet.place(_picture(originals[row]), row, 0)
    shift, spread = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    for place, view in enumerate(views):
        size = f"{view.shape[-1]} px"
        sheet.head(place + first, f"{names[place]}\n{size}" if names else size)
        for row in range(rows):
            pixels = (view[row].cpu() * spread + shift).clamp(0, 1).mul(255).round().byte()
            sheet.place(_picture(pixels), row, place + first, note=notes[place][row] if notes else "")
    return sheet.png()


def picture_strip(images_BCHW: Tensor, *, cell_px: int = 112) -> bytes:
    """Images one above the other, as a PNG."""
    return _strip([_picture(image) for image in images_BCHW], cell_px)


def attention_strip(images_BCHW: Tensor, maps_BYX: Tensor, *, cell_px: int = 112) -> bytes:
    """Maps over their images, one above the other, as a PNG.

    Args:
        images_BCHW: uint8.
        maps_BYX: float, any scale; each is stretched for itself.
        cell_px: Side of a picture.
    """
    cells = [_heat(_picture(image), one) for image, one in zip(images_BCHW, maps_BYX, strict=True)]
    return _strip(cells, cell_px)


def patch_strip(colours_BYX3: Tensor, *, cell_px: int = 112) -> bytes:
    """Patches as squares of colour, one image above the other, as a PNG; colours are from 0 to 1."""
    pixels = colours_BYX3.mul(255).round().byte().numpy()
    return _strip([Image.fromarray(image) for image in pixels], cell_px, smooth=False)


def patch_picture(
    images_BCHW: Tensor, colours_BYX3: Tensor, *, names: Sequence[str], cell_px: int = 224
) -> bytes:
    """Images with their patches as squares of colour beside them, one row for each, as a PNG.

    Args:
        images_BCHW: uint8, what the network saw.
        colours_BYX3: From 0 to 1; equal colours mean the same in all rows.
        names: Under the images.
        cell_px: Side of a picture.
    """
    sheet = _Sheet(len(images_BCHW), [cell_px] * 2, cell_px=cell_px, captions=True, heads=1)
    for column, words in enumerate(("image", "patches")):
        sheet.head(column, words)
    squares = colours_BYX3.mul(255).round().byte().cpu().numpy()
    for row, (image_CHW, name) in enumerate(zip(images_BCHW, names, strict=True)):
        sheet.place(_picture(image_CHW), row, 0, caption=name)
        patches = Image.fromarray(squares[row]).resize((cell_px, cell_px), Image.Resampling.NEAREST)
        sheet.place(patches, row, 1)
    return sheet.png()


def _strip(pictures: Sequence[Image.Image], cell_px: int, *, smooth: bool = True) -> bytes:
    """Pictures one above the other with a little white between them."""
    gap_px = 4
    page = Image.new("RGB", (cell_px, len(pictures) * (cell_px + gap_px) - gap_px), _PAPER)
    filter_ = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for place, picture in enumerate(pictures):
        page.paste(picture.resize((cell_px, cell_px), filter_), (0, place * (cell_px + gap_px)))
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def attention_picture(image_CHW: Tensor, maps_AYX: Tensor, *, cell_px: int = 224, columns: int = 4) -> bytes:
    """An image, the mean of its attention maps, and each head's.

    Args:
        image_CHW: uint8, what the network saw.
        maps_AYX: float, how much each patch is attended to, for each head; any scale.
        cell_px: Side of a picture.
        columns: Pictures in a row, at most.

    Returns:
        A PNG.
    """
    picture = _picture(image_CHW)
    heads = maps_AYX.detach().float().cpu()
    cells = [("image", picture), ("mean of heads", _heat(picture, heads.mean(dim=0)))]
    cells += [(f"head {number}", _heat(picture, one)) for number, one in enumerate(heads, start=1)]
    columns = min(columns, len(cells))
    sheet = _Sheet(
        -(-len(cells) // columns), [cell_px] * columns, cell_px=cell_px, captions=True, first_apart=False
    )
    for place, (name, cell) in enumerate(cells):
        sheet.place(cell, place // columns, place % columns, caption=name)
    return sheet.png()


@dataclass(frozen=True)
class Panel:
    """One diagram of `curves`: which values of a row it shows."""

    title: str
    series: Mapping[str, str]
    """Name in the legend -> key in the rows."""
    reference: tuple[str, float] | None = None
    """A horizontal line and what it says, such as ("ln K", 8.3)."""


def curves(
    rows: Sequence[Mapping[str, object]],
    panels: Sequence[Panel],
    *,
    events: Mapping[int, str] | None = None,
    step_key: str = "step",
) -> bytes:
    """Diagrams over steps, two abreast, from the rows of a run's log.

    A row that lacks a key (k-NN is measured now and then) is left out of that line, and so is a value that
    is not a finite number.

    Args:
        rows: As in the JSON lines of a run, in the order of steps.
        panels: What to draw.
        events: Step -> what happened; a thin vertical line in each panel, named in the first.
        step_key: Which value is the step.

    Returns:
        A PNG.
    """
    abreast = min(2, len(panels))
    deep = -(-len(panels) // abreast)
    with mpl.rc_context({"font.size": 15, "font.family": "DejaVu Sans", "text.color": "#1f2328"}):
        figure = Figure(figsize=(6.2 * abreast, 4.3 * deep), dpi=100, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(deep, abreast, place + 1)
            _draw_panel(axes, panel, rows, step_key=step_key)
            for step, name in (events or {}).items():
                axes.axvline(step, color="#bf8700", linewidth=1.2)
                if place == 0:
                    _name_event(axes, step, name)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, object]], *, step_key: str) -> None:
    """One diagram, its legend above, where it hides no line."""
    for (name, key), colour in zip(panel.series.items(), _SERIES * 3, strict=False):
        steps, values = _line(rows, key, step_key=step_key)
        marker = "o" if len(steps) <= 40 else ""
        axes.plot(steps, values, color=colour, linewidth=2.2, marker=marker, markersize=5, label=name)
    if panel.reference is not None:
        name, height = panel.reference
        axes.axhline(height, color="#59636e", linewidth=1.4, linestyle="--", label=name)
    has_legend = len(panel.series) > 1 or panel.reference is not None
    axes.set_title(panel.title, loc="left", fontweight="bold", fontsize=16, pad=32 if has_legend else 10)
    if has_legend:
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, **_LEGEND)
        legend.set_in_layout(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.8)
    axes.margins(x=0.02)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.set_xlabel(step_key, color="#59636e")
    axes.tick_params(colors="#59636e", length=0)


def _name_event(axes: Axes, step: int, name: str) -> None:
    """Writes beside an event's line, just above the axis."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    along_axis = axes.get_xaxis_transform()
    axes.text(
        step, 0.03, f" {name}", transform=along_axis, color="#9a6700", fontsize=13, bbox=paper, zorder=4
    )


def _line(
    rows: Sequence[Mapping[str, object]], key: str, *, step_key: str
) -> tuple[list[float], list[float]]:
    """Steps and values of one key where there is a finite number."""
    steps, values = [], []
    for row in rows:
        step, value = row.get(step_key), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and np.isfinite(value):
            steps.append(float(step))
            values.append(float(value))
    return steps, values


class _Sheet:
    """A white page of cells in rows and columns, with room for a line of text above and under them."""

    def __init__(
        self,
        rows: int,
        columns_px: Sequence[int],
        *,
        cell_px: int,
        captions: bool = False,
        heads: int = 0,
        notes: int = 0,
        first_apart: bool = True,
    ) -> None:
        self._columns_px, self._cell_px = list(columns_px), cell_px
        gap_px = max(6, cell_px // 20)
        self._font_px = cell_px // 6  # 8 px or more where a phone shows six columns on 360
        self._note_px = max(8, cell_px // 10)
        self._head_px = round((0.6 + heads) * self._font_px) if heads else gap_px
        below_px = round(1.5 * self._font_px) if captions else round(1.2 * self._note_px * notes)
        self._row_px = cell_px + gap_px + below_px
        self._lefts_px = [gap_px]
        for place, side_px in enumerate(self._columns_px):
            apart_px = 2 * gap_px if first_apart and place == 0 else 0
            self._lefts_px.append(self._lefts_px[-1] + side_px + gap_px + apart_px)
        self._page = Image.new("RGB", (self._lefts_px[-1], self._head_px + rows * self._row_px), _PAPER)
        self._draw = ImageDraw.Draw(self._page)

    def head(self, column: int, words: str) -> None:
        """Writes above a column, one line for each line of the words."""
        lines = words.splitlines()
        top_px = (self._head_px - len(lines) * self._font_px) / 2
        for place, line in enumerate(lines):
            self._write(line, column, top_px + (place + 0.5) * self._font_px, _FAINT)

    def place(
        self,
        picture: Image.Image,
        row: int,
        column: int,
        *,
        caption: str = "",
        note: str = "",
        colour: tuple[int, int, int] | None = None,
    ) -> None:
        """Puts a picture in the middle of its cell, whole; a bar, caption or small lines go below."""
        left, top = self._lefts_px[column], self._head_px + row * self._row_px
        side_px = self._columns_px[column]
        scale = side_px / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        shown = picture.resize(size, Image.Resampling.LANCZOS)
        self._page.paste(shown, (left + (side_px - size[0]) // 2, top + (self._cell_px - size[1]) // 2))
        bottom = top + self._cell_px
        if colour is not None:
            bar_px = max(3, self._cell_px // 28)
            self._draw.rectangle((left, bottom, left + side_px - 1, bottom + bar_px - 1), fill=colour)
        self._write(caption, column, bottom + 0.9 * self._font_px, colour or _INK)
        for line_number, line in enumerate(note.splitlines()):
            middle_px = bottom + 1.2 * self._note_px * (line_number + 0.7)
            self._write(line, column, middle_px, _FAINT, size_px=self._note_px)

    def _write(
        self,
        words: str,
        column: int,
        middle_px: float,
        colour: tuple[int, int, int],
        *,
        size_px: int | None = None,
    ) -> None:
        """Centres words in a column: smaller if it is too narrow, and then cut with an ellipsis."""
        side_px, wished_px = self._columns_px[column], size_px or self._font_px
        size_px = wished_px
        font = ImageFont.load_default(size_px)
        while font.getlength(words) > side_px and size_px > 0.7 * wished_px:
            size_px -= 1
            font = ImageFont.load_default(size_px)
        shown = words
        while shown and font.getlength(shown) > side_px:
            shown = shown[:-2].rstrip("…") + "…" if len(shown) > 2 else ""
        self._draw.text((self._lefts_px[column] + side_px / 2, middle_px), shown, colour, font, anchor="mm")

    def png(self) -> bytes:
        """The page."""
        buffer = io.BytesIO()
        self._page.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def _picture(pixels_CHW: Tensor) -> Image.Image:
    """A picture of uint8 pixels; of other than three channels the first is shown, in grey."""
    if pixels_CHW.shape[0] == 3:
        return Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().cpu().numpy())
    return Image.fromarray(pixels_CHW[0].contiguous().cpu().numpy()).convert("RGB")


def _heat(picture: Image.Image, map_YX: Tensor) -> Image.Image:
    """The picture in grey under the map, dark where nothing is attended to."""
    return Image.fromarray(heat_over(np.asarray(picture), map_YX.detach().float().nan_to_num().cpu().numpy()))
