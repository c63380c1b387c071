"""The model card says what was measured, and what was not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dino_core.bundle import read_manifest
from tests.training.conftest import MakeConfig
from training.checkpoint import save_checkpoint
from training.errors import ConfigError
from training.export import export_checkpoint, export_teacher, model_card
from training.state import new_state

DATA = {"name": "birds", "images": 1234, "classes": 3, "skipped": 0}


def evaluation(step: int, percent: float) -> dict[str, Any]:
    knn = {"knn_percent": percent, "knn_k": 20, "knn_kind": "val", "knn_bank": 500, "knn_queries": 80}
    return {"step": step, "kind": "evaluation", "rank_me": 12.34, "feature_std": 0.5, **knn}


def card_of(make_config: MakeConfig, evaluations: list[dict[str, Any]]) -> str:
    return model_card("birds", make_config(), 6, data=DATA, evaluations=evaluations, with_curves=True)


def test_the_card_has_data_recipe_and_both_accuracies(make_config: MakeConfig) -> None:
    card = card_of(make_config, [evaluation(0, 21.0), evaluation(6, 34.5)])
    assert "1,234 images of `birds` in 3 folders" in card
    assert "`tiny`, 6 steps of 4 images, seed 0" in card
    assert "| k-NN accuracy in %, k = 20 | 21.0 | **34.5** |" in card
    assert "80 held-out validation images, each classified by 500 training images" in card
    assert "![Loss and k-NN accuracy over the run](curves.png)" in card
    for heading in ("## Measured", "## Limits", "## Licence"):
        assert heading in card


def test_what_was_seen_in_training_is_not_called_held_out(make_config: MakeConfig) -> None:
    evaluations = [evaluation(0, 21.0) | {"knn_kind": "seen"}, evaluation(6, 34.5) | {"knn_kind": "seen"}]
    card = card_of(make_config, evaluations)
    assert "held-out" not in card
    assert "80 training images (seen, without labels)" in card


def test_what_was_not_measured_is_not_claimed(make_config: MakeConfig) -> None:
    assert "Nothing was measured" in card_of(make_config, [])
    without_values = {"step": 6, "kind": "evaluation"}
    assert "k-NN accuracy in %" not in card_of(make_config, [evaluation(0, 21.0), without_values])


def test_a_lone_checkpoint_can_be_exported(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(backbone={"pooling": "cls+mean"})
    path = save_checkpoint(tmp_path / "elsewhere", new_state(config, device=torch.device("cpu")), config)
    manifest = export_checkpoint(path, tmp_path / "models" / "lone")
    assert manifest.embedding_dimension == 64
    assert read_manifest(tmp_path / "models" / "lone").provenance["recipe"] == "tiny"
    assert "Nothing was measured" in (tmp_path / "models" / "lone" / "README.md").read_text()


def test_nothing_is_written_over(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    state = new_state(config, device=torch.device("cpu"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is there already"):
        export_teacher(state, config, tmp_path / "file", directory=None, data=DATA)
