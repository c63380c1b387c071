"""Principal components against scikit-learn, and colours that mean the same in every image."""

import pytest
import torch

from training.components import map_of, patch_colours, principal_components


def test_scores_are_scikit_learns_up_to_sign() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    rows = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8)
    expected = torch.from_numpy(decomposition.PCA(3).fit_transform(rows.double().numpy()))
    found = principal_components(rows, count=3).double()
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-5, atol=1e-5)
    assert bool((found.pow(3).sum(dim=0) > 0).all()), "signs stay, whatever the solver gave"


def test_equal_patches_of_two_images_have_one_colour() -> None:
    patches = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    patches[1, 4] = patches[0, 2]
    colours = patch_colours(patches)
    assert colours.shape == (2, 9, 3)
    assert torch.equal(colours[1, 4], colours[0, 2])
    assert 0 <= float(colours.min()) <= float(colours.max()) <= 1


def test_fewer_dimensions_than_colours_leave_the_rest_dark() -> None:
    colours = patch_colours(torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(0)))
    assert colours[..., 2].tolist() == [[0.0] * 9]
    assert map_of(torch.randn(5, 1)).shape == (5, 2)
