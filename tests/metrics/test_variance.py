"""The fraction of variance unexplained against scikit-learn and its closed form."""

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from lightning_ae import FractionVarianceUnexplained


def data(n=17, event=(2, 3), offset=3.0):
    torch.manual_seed(0)
    x = offset + torch.randn(n, *event)
    return x + 0.3 * torch.randn(n, *event), x


def fvu(batches):
    metric = FractionVarianceUnexplained()
    for preds, target in batches:
        metric.update(preds, target)
    return metric.compute()


def test_is_error_over_total_variance():
    preds, x = data()
    p, t = preds.double().numpy().reshape(17, 6), x.double().numpy().reshape(17, 6)
    expected = ((p - t) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    assert fvu([(preds, x)]).item() == pytest.approx(expected, rel=1e-6)


def test_is_one_less_scikit_learns_variance_weighted_r2():
    preds, x = data()
    r2 = r2_score(x.flatten(1).numpy(), preds.flatten(1).numpy(), multioutput="variance_weighted")
    assert fvu([(preds, x)]).item() == pytest.approx(1 - r2, rel=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 17, [7, 7, 3], [16, 1], [5, 12]])
def test_does_not_depend_on_how_batches_split_the_data(sizes):
    preds, x = data()
    batches = list(zip(preds.split(sizes), x.split(sizes), strict=True))
    assert fvu(batches).item() == pytest.approx(fvu([(preds, x)]).item(), rel=1e-6)


def test_forward_merges_batches_as_update_does():
    preds, x = data()
    metric = FractionVarianceUnexplained()
    for batch in zip(preds.split(7), x.split(7), strict=True):
        assert metric(*batch).item() == pytest.approx(fvu([batch]).item(), rel=1e-6)
    assert metric.compute().item() == pytest.approx(fvu([(preds, x)]).item(), rel=1e-6)


def test_features_that_never_vary_do_no_harm():
    preds, x = data()
    x[:, 0] = 5.0
    preds[:, 0] = 5.0
    inside = fvu([(preds[:, 1:], x[:, 1:])])
    assert fvu([(preds, x)]).item() == pytest.approx(inside.item(), rel=1e-6)


def test_survives_a_large_offset_in_single_precision():
    preds, x = data(offset=1000.0)
    p, t = preds.double().numpy().reshape(17, 6), x.double().numpy().reshape(17, 6)
    expected = ((p - t) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    assert fvu([(preds, x)]).item() == pytest.approx(expected, rel=1e-5)


def test_is_zero_for_the_data_and_one_for_their_mean():
    _, x = data()
    assert fvu([(x, x)]).item() == 0
    assert fvu([(x.mean(0, keepdim=True).expand_as(x), x)]).item() == pytest.approx(1, rel=1e-5)


def test_reset_forgets():
    preds, x = data()
    metric = FractionVarianceUnexplained()
    metric.update(x, x)
    metric.reset()
    metric.update(preds, x)
    assert metric.compute().item() == pytest.approx(fvu([(preds, x)]).item())
    metric.reset()
    metric.update(torch.zeros(3, 2), torch.eye(3, 2))  # another number of features
    assert metric.compute().item() == pytest.approx(2 / np.sum((np.eye(3, 2) - np.eye(3, 2).mean(0)) ** 2))
