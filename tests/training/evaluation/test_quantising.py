"""Smaller embeddings: codes by hand, and costs of the size that is known."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from training.data.folder import ImageList
from training.evaluation.copies import Copies
from training.evaluation.quantising import Labelled, quantised


def labelled(*, split: bool, shift: float = 0.0) -> Labelled:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 5
    features = torch.eye(5, 64)[labels] * 4 + torch.randn(300, 64, generator=generator) + shift
    if not split:
        return Labelled(
            gallery_ND=features, gallery_labels_N=labels, names=[str(n) for n in range(300)], queries=None
        )
    return Labelled(
        gallery_ND=features[:200],
        gallery_labels_N=labels[:200],
        names=[str(n) for n in range(200)],
        queries=(features[200:], labels[200:]),
    )


@pytest.mark.parametrize("split", [True, False])
def test_a_byte_costs_little_and_a_bit_costs_more(split: bool) -> None:
    forms = quantised(labelled(split=split), None)
    assert {name: form.bytes_per_vector for name, form in forms.items()} == {
        "float32": 256,
        "int8": 64,
        "binary": 8,
    }
    recall = {name: form.measures["recall_at_10"].value for name, form in forms.items() if name != "float32"}
    assert recall["int8"] > 95
    assert 10 < recall["binary"] < 80
    accuracy = {name: form.measures["top1_k20"].value for name, form in forms.items()}
    assert accuracy["int8"] == pytest.approx(accuracy["float32"], abs=2)
    assert 40 < accuracy["binary"] < accuracy["float32"] - 5
    assert "top1_k10" not in forms["int8"].measures


def test_bits_of_features_that_are_all_positive_still_say_something() -> None:
    """Signs of what comes after a ReLU are all plus; the bit is above or below the gallery's mean."""
    forms = quantised(labelled(split=True, shift=50.0), None)
    assert forms["binary"].measures["top1_k20"].value > 30, "one class in five is 20"


def test_by_hand() -> None:
    """Two dimensions: codes of a byte are exact enough for the order, bits keep the quadrant alone."""
    angles = torch.tensor([0.2, 0.6, 1.7, 3.5, 5.0])
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    data = Labelled(
        gallery_ND=gallery,
        gallery_labels_N=torch.tensor([0, 1, 2, 3, 4]),
        names=list("abcde"),
        queries=(gallery[:2], torch.tensor([0, 1])),
    )
    forms = quantised(data, None)
    assert forms["int8"].measures["p_at_1"].value == 100
    # The first two lie in one quadrant: each is as likely to be the nearest.
    assert forms["binary"].measures["p_at_1"].value == 50


def test_copies_are_looked_for_in_every_form() -> None:
    generator = torch.Generator().manual_seed(0)
    features = functional.normalize(torch.randn(20, 256, generator=generator), dim=1)
    features[10:] = functional.normalize(
        features[:10] + 0.02 * torch.randn(10, 256, generator=generator), dim=1
    )
    copies = Copies(
        images=ImageList(Path("made"), names=tuple(f"{n:02}" for n in range(20))),
        queries_M=torch.arange(10, 20),
        originals_M=torch.arange(10),
        attacks=("noise",) * 10,
    )
    forms = quantised(None, (copies, features))
    assert {form.measures["copies_p_at_1"].value for form in forms.values()} == {100}
    assert quantised(None, None) == {}
