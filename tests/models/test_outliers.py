"""The detector: outliers in its own training data, units, new rows, and errors at the door."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.metrics import roc_auc_score

import lightning_ae as ae


def sheet(n: int = 200, odd: int = 20) -> tuple[torch.Tensor, np.ndarray]:
    """Rows of rank 2 in 8 with noise; rows of the same variances without their correlations."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 8, generator=generator)
    x = torch.randn(n, 2, generator=generator) @ basis + 0.1 * torch.randn(n, 8, generator=generator)
    others = x.std(0) * torch.randn(odd, 8, generator=generator)
    return torch.cat([x, others]), np.r_[np.zeros(n), np.ones(odd)]


@pytest.fixture(scope="module")
def fitted() -> ae.OutlierDetector:
    return ae.OutlierDetector().fit(sheet()[0], accelerator="cpu")


def test_rows_that_break_what_ties_columns_together_are_found_in_the_training_data(fitted):
    x, y = sheet()
    assert roc_auc_score(y, fitted.score(x)) > 0.9
    # each alone is nothing special
    assert roc_auc_score(y, x.square().sum(1)) < 0.7


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trimming_is_what_keeps_outliers_that_are_alike_from_being_learnt(seed):
    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    basis = normal(3, 12)
    usual = normal(200, 3) @ basis + 0.3 * normal(200, 12)
    x = torch.cat([usual, 3 * normal(1, 12) + 0.3 * normal(20, 12)])
    y = np.r_[np.zeros(200), np.ones(20)]
    detectors = [ae.OutlierDetector(trim=trim).fit(x, accelerator="cpu") for trim in (0.3, 0)]
    trimmed, plain = (roc_auc_score(y, detector.score(x)) for detector in detectors)
    assert trimmed > 0.95
    assert plain < 0.6


def test_the_unit_and_the_origin_of_a_column_do_not_matter(fitted):
    x, _ = sheet()
    unit = torch.tensor([1e-3, 1.0, 10.0, 1e4, 1.0, 1.0, 1.0, 1.0])
    other = ae.OutlierDetector().fit(x * unit + 3 * unit, accelerator="cpu").score(x * unit + 3 * unit)
    assert np.corrcoef(fitted.score(x), other)[0, 1] > 0.999


def test_new_rows_are_scored_one_by_one(fitted):
    x, _ = sheet()
    far = 30 * torch.ones(1, 8)
    scores = fitted.score(torch.cat([x[:5], far]))
    torch.testing.assert_close(scores[:5], fitted.score(x)[:5])
    assert scores[5] > fitted.score(x).max()
    assert fitted.score(2 * far) > fitted.score(far)  # beyond the data it goes on growing


def test_a_fit_is_that_of_its_seed_and_leaves_the_random_state_alone(fitted):
    x, _ = sheet()
    before = torch.random.get_rng_state()
    again = ae.OutlierDetector().fit(x, accelerator="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(again.score(x), fitted.score(x))
    assert not torch.equal(ae.OutlierDetector(seed=1).fit(x, accelerator="cpu").score(x), fitted.score(x))


def test_a_score_is_the_surprise_of_its_rank(fitted):
    x, _ = sheet()
    scores, n = fitted.score(x).sort(descending=True).values, len(x)
    torch.testing.assert_close(scores, -((torch.arange(1, n + 1) + 0.5) / (n + 1)).log())


def test_images_arrays_and_sparse_matrices_are_rows():
    x = torch.poisson(torch.full((40, 6), 0.5), generator=torch.Generator().manual_seed(0))
    x[:, 5] = 2  # a constant column
    detector = ae.OutlierDetector(steps=5)
    plain = detector.fit(x, accelerator="cpu").score(x)
    for form in (x.numpy().astype(np.uint8), scipy.sparse.csr_matrix(x.numpy()), x.double()):
        torch.testing.assert_close(detector.fit(form, accelerator="cpu").score(form), plain)
    image = x.view(40, 1, 2, 3)
    torch.testing.assert_close(detector.fit(image, accelerator="cpu").score(image), plain)


def test_errors_say_what_to_do():
    detector = ae.OutlierDetector(steps=1)
    with pytest.raises(RuntimeError, match="fit it to rows first"):
        detector.score(torch.rand(3, 2))
    with pytest.raises(ValueError, match="x: expected at least 10 rows, got 9"):
        detector.fit(torch.rand(9, 2))
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        detector.fit(torch.full((20, 2), torch.nan))
    with pytest.raises(ValueError, match=r"x: expected rows of shape \(2,\), as it was fitted to, got \(3,\)"):
        detector.fit(torch.rand(20, 2), accelerator="cpu").score(torch.rand(5, 3))
