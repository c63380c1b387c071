"""`dino-train reduce`: through the command line, on a real bundle and a real folder."""

from pathlib import Path

import pytest
import torch

from dino_core.backbones import make_backbone
from dino_core.bundle import load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing
from tests.training.conftest import MakeFolder
from training.cli import main
from training.data.opening import open_images
from training.evaluation.embedding import embed_images


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = EmbeddingModel(
        make_backbone("vit_tiny_patch16_224", image_size_px=16, model_kwargs=tiny),
        preprocessing=Preprocessing(resize_px=16, crop_px=16),
        pooling="cls",
    )
    path = tmp_path / "models/whole"
    card = "# whole\n\nThe whole truth: `dino-serve run --model models/whole`.\n"
    write_bundle(path, model, provenance={"seed": 0}, card=card, assets={"curves.png": b"a picture"})
    return path


def test_the_new_bundle_gives_centred_embeddings_of_the_asked_length(
    bundle: Path, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pictures = tmp_path / "models/short", make_folder(per_class=12)
    assert main(["reduce", str(bundle), "--data", str(pictures), "--out", str(out), "--dimensions", "6"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 dimensions in place of 32" in said
    assert "fitted to 24 images" in said
    old, new = load_bundle(bundle), load_bundle(out)
    assert new.manifest.embedding_dimension == 6
    projection = new.model.projection
    assert projection is not None
    whole_ND = embed_images(old.model, open_images(pictures)).features_ND
    torch.testing.assert_close(projection.get_buffer("mean_D"), whole_ND.mean(dim=0), atol=1e-5, rtol=0)
    torch.testing.assert_close(projection(whole_ND).mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    assert new.manifest.provenance["seed"] == 0
    assert new.manifest.provenance["projection"]["of"] == old.manifest.fingerprint
    assert (out / "curves.png").read_bytes() == b"a picture"
    card = (out / "README.md").read_text()
    assert card.startswith("# short\n\nThe whole truth: `dino-serve run --model models/short`.")
    assert "its 6 strongest directions" in " ".join(card.split())


def test_a_projection_is_replaced_not_followed_by_another(
    bundle: Path, make_folder: MakeFolder, tmp_path: Path
) -> None:
    pictures = make_folder(per_class=12)
    first, second = tmp_path / "models/first", tmp_path / "models/second"
    words = ["--data", str(pictures), "--whitening", "0.5"]
    assert main(["reduce", str(bundle), "--out", str(first), "--dimensions", "4", *words]) == 0
    assert main(["reduce", str(first), "--out", str(second), "--dimensions", "8", *words]) == 0
    assert load_bundle(second).manifest.embedding_dimension == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dimensions", "33"], "33 dimensions cannot be kept of 32: give 1 to 32"),
        (["--dimensions", "24"], "24 images span fewer than 24 directions: give more than 24 images"),
        (["--whitening", "2"], "whitening"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    bundle: Path,
    make_folder: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    out = tmp_path / "models/short"
    assert (
        main(["reduce", str(bundle), "--data", str(make_folder(per_class=12)), "--out", str(out), *words])
        == 2
    )
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_bundle_that_is_there_stays(
    bundle: Path, make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reduce", str(bundle), "--data", str(make_folder()), "--out", str(bundle)]) == 2
    assert "is there already" in capsys.readouterr().err
