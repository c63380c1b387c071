"""The report of real runs: whole, of itself alone, and true to what happened."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.training.conftest import MakeConfig, MakeFolder
from training.cli import main
from training.errors import RunDirectoryError
from training.loop import run
from training.report.gallery import hung_in, thinned
from training.report.writing import write_report
from training.rundir import RunPlan

LOADED = re.compile(r"""(?:src|href)=["'](?!data:|#)""")


class Checked(HTMLParser):
    """Counts tags that are opened and closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in {"meta", "img", "br", "path", "rect", "circle", "line", "polyline", "link", "hr"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


@pytest.fixture
def finished(make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path) -> Path:
    """The folder of a run on pictures of two classes, one of which has a hostile name."""
    folder = make_folder(per_class=12)
    (folder / "across").rename(folder / "<script>alert(1)</script>".replace("/", "∕"))
    plan = RunPlan(
        data=folder,
        val_data=None,
        out=tmp_path / "models/tiny",
        config=make_config(),
        reasons={"steps": "6: because <b>I</b> say so"},
    )
    assert run(plan, tmp_path / "runs/tiny", resume=False, console=Console(quiet=True)) is not None
    return tmp_path / "runs/tiny"


def test_a_run_ends_with_a_report_that_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert not LOADED.search(page)
    assert "<script>alert" not in page
    assert "<b>I</b>" not in page
    parser = Checked()
    parser.feed(page)
    assert parser.open == []
    words_in_it = ("entropy", "KL", "k-NN", "RankMe", "Where the class token looks")
    for words in (*words_in_it, "<figcaption>Gradient norm by part", "<figcaption>Distance of teacher"):
        assert words in page, words
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) >= 4
    for picture in pictures:
        assert min(Image.open(io.BytesIO(base64.b64decode(picture))).size) > 8


def test_a_report_of_a_run_that_goes_on_says_so(finished: Path, tmp_path: Path) -> None:
    (finished / "result.json").unlink()
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (finished / "metrics.jsonl").write_text(
        "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 3)
    )
    out = tmp_path / "elsewhere.html"
    assert write_report(finished, out) == out
    assert "not finished" in out.read_text() or "unfinished" in out.read_text()


def test_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run in"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_the_command_writes_where_it_is_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").exists()
    assert "r.html" in capsys.readouterr().out


def test_pictures_are_hung_at_each_measurement(finished: Path) -> None:
    assert [path.name for path in hung_in(finished / "pictures")] == [
        f"step-{step:08d}" for step in (0, 3, 6)
    ]
    for path in hung_in(finished / "pictures"):
        assert {"images.png", "attention.png", "neighbours.png", "measures.json"} <= {
            file.name for file in path.iterdir()
        }


def test_a_long_run_keeps_the_first_and_the_last_picture_and_some_between() -> None:
    gone = thinned(list(range(0, 100, 5)), most=8)
    kept = sorted(set(range(0, 100, 5)) - set(gone))
    assert len(kept) == 8
    assert (kept[0], kept[-1]) == (0, 95)
    assert thinned([0, 5, 10], most=8) == []


def test_a_preview_is_written_without_training(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "run",
        "--data",
        str(make_folder(per_class=20)),
        "--recipe",
        "smoke",
        "--device",
        "cpu",
        "--preview",
    ]
    words += ["--out", str(tmp_path / "models/x"), "--run-dir", str(tmp_path / "runs/x")]
    assert main(words) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture == tmp_path / "runs/x/preview.png"
    with Image.open(picture) as preview:
        assert preview.width > 300
    assert not (tmp_path / "models/x").exists()
    assert not (tmp_path / "runs/x/metrics.jsonl").exists()
    assert main([word for word in words if word != "--preview"] + ["--steps", "2"]) == 0  # it is no run yet
