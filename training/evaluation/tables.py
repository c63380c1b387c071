"""What was measured, as tables: the same for a terminal and for a model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from training.evaluation.intervals import Difference, Estimate
from training.evaluation.quantising import NEIGHBOURS_KEPT
from training.evaluation.report import Comparison, ModelReport

WORDS = {
    "top1_k10": "k-NN, k = 10",
    "top1_k20": "k-NN, k = 20",
    "top1_k100": "k-NN, k = 100",
    "top1_k200": "k-NN, k = 200",
    "linear": "linear probe",
    "p_at_1": "class, P@1",
    "map": "class, mAP",
    "copies_p_at_1": "copies, P@1",
    "copies_map": "copies, mAP",
    "copies_micro_ap": "copies, micro-AP",
    "recall_at_10": f"{NEIGHBOURS_KEPT} neighbours kept",
    "cosine": "cosine × 100",
    "neighbours": f"{NEIGHBOURS_KEPT} neighbours kept",
}
_SPREAD = {"feature_std": "spread", "rank_me": "RankMe"}
_SIGNS = {"better": "▲", "worse": "▼", "no difference seen": "·"}
_OF_FORMS = ("recall_at_10", "top1_k20", "top1_k10", "map", "copies_p_at_1", "copies_micro_ap")
_WORST = 5


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def sections(reports: Sequence[ModelReport], comparisons: Sequence[Comparison]) -> list[Section]:
    """All tables, but for those with nothing in them."""
    found = [_measures(reports), _against(comparisons), _by_attack(reports)]
    for report in reports:
        if not report.is_baseline:
            found += [_robustness(report), _forms(report), _worst_classes(report)]
    return [section for section in found if section.rows]


def as_rich(tables: Sequence[Section], *, width: int) -> Group:
    """For a terminal; where it is too narrow, intervals go below their numbers."""
    shown: list[Table | Text] = []
    for section in tables:
        longest = [max(len(row[place]) for row in section.rows) for place in range(len(section.head))]
        breaks = sum(longest) + 2 * len(longest) > width
        table = Table(*section.head, title=section.title, title_justify="left", box=None, pad_edge=False)
        for row in section.rows:
            cells = [cell.replace(" [", "\n[") if breaks else cell for cell in row]
            table.add_row(*(Text(cell) for cell in cells))
        shown += [table, Text(f"{section.note}\n" if section.note else "", style="dim")]
    return Group(*shown)


def as_markdown(tables: Sequence[Section]) -> str:
    """For a model card."""
    parts = []
    for section in tables:
        lines = [f"### {section.title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in [section.head]]
        lines += ["|---" + "|--:" * (len(section.head) - 1) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
        parts.append("\n".join([*lines, *(["", section.note] if section.note else [])]))
    return "\n\n".join(parts) + "\n"


def in_words(estimate: Estimate | None) -> str:
    """A number with its 95 % interval."""
    return "" if estimate is None else f"{estimate.value:.1f} [{estimate.low:.1f}–{estimate.high:.1f}]"


def _signed(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{_SIGNS[found.verdict]} {found.value:+.1f} [{found.low:+.1f} to {found.high:+.1f}]"


def _measures(reports: Sequence[ModelReport]) -> Section:
    names = dict.fromkeys(name for report in reports for name in report.measures)
    rows = [[WORDS[name], *(in_words(report.measures.get(name)) for report in reports)] for name in names]
    for name, words in _SPREAD.items():
        values = [report.spread.get(name) for report in reports]
        if any(value is not None for value in values):
            rows.append([words, *("" if value is None else f"{value:.2f}" for value in values)])
    rows.append(["dimensions", *(str(report.dimensions) for report in reports)])
    kinds = ". ".join(dict.fromkeys(report.kind for report in reports if report.kind))
    return Section(
        title="What the embeddings are worth",
        note=". ".join(part for part in ("In %, with 95 % intervals", kinds) if part) + ".",
        head=["", *(report.name for report in reports)],
        rows=rows,
    )


def _against(comparisons: Sequence[Comparison]) -> Section:
    names = [name for name in WORDS if any(name in one.differences for one in comparisons)]
    return Section(
        title=f"{comparisons[0].model} against the others" if comparisons else "",
        note="Points of %, on the same queries: ▲ better, ▼ worse, · no difference seen (0 in the interval).",
        head=["", *(f"than {one.than}" for one in comparisons)],
        rows=[[WORDS[name], *(_signed(one.differences.get(name)) for one in comparisons)] for name in names],
    )


def _by_attack(reports: Sequence[ModelReport]) -> Section:
    attacks = sorted({attack for report in reports for attack in report.by_attack})
    return Section(
        title="Copies by what was done to them",
        note="P@1: how many find their original first, in %.",
        head=["", *(report.name for report in reports)],
        rows=[
            [attack, *(in_words(report.by_attack.get(attack, {}).get("p_at_1")) for report in reports)]
            for attack in attacks
        ],
    )


def _robustness(report: ModelReport) -> Section:
    return _parts(
        report.robustness,
        title=f"{report.name}: changed queries against unchanged pictures",
        note=f"In %, {_count(report.robustness)} pictures; pictures that were smaller already are left out.",
        what="query",
    )


def _forms(report: ModelReport) -> Section:
    section = _parts(
        {
            form: {name: one.measures[name] for name in _OF_FORMS if name in one.measures}
            for form, one in report.forms.items()
        },
        title=f"{report.name}: smaller embeddings",
        note="Neighbours are those of float32; scales and thresholds are fitted on the gallery.",
        what="form",
    )
    sizes = [f"{form.bytes_per_vector}" for form in report.forms.values()]
    return Section(
        title=section.title,
        note=section.note,
        head=[section.head[0], "bytes", *section.head[1:]],
        rows=[[row[0], size, *row[1:]] for row, size in zip(section.rows, sizes, strict=True)],
    )


def _worst_classes(report: ModelReport) -> Section:
    worst = sorted(report.by_class.items(), key=lambda item: (item[1].value, item[0]))[:_WORST]
    return Section(
        title=f"{report.name}: classes that k-NN knows least",
        note=f"The worst of {len(report.by_class)}, in %; --json-file has all.",
        head=["class", "images", "right"],
        rows=[[name, str(share.queries), in_words(share)] for name, share in worst],
    )


def _parts(parts: Mapping[str, Mapping[str, Estimate]], *, title: str, note: str, what: str) -> Section:
    known = {name for measures in parts.values() for name in measures}
    names = [name for name in WORDS if name in known]
    return Section(
        title=title,
        note=note,
        head=[what, *(WORDS.get(name, name) for name in names)],
        rows=[[part, *(in_words(measures.get(name)) for name in names)] for part, measures in parts.items()],
    )


def _count(parts: Mapping[str, Mapping[str, Estimate]]) -> int:
    return max((one.queries for measures in parts.values() for one in measures.values()), default=0)
