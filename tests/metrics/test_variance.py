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


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e7])
@pytest.mark.parametrize("sizes", [[17], [1] * 17, [9, 8]])
def test_is_exact_wherever_the_data_lie(offset, sizes):
    """In whole numbers, which single precision has at ten million, too: against Python's own integers."""
    generator = np.random.default_rng(0)
    x, noise = generator.integers(-20, 20, (17, 6)), generator.integers(-3, 3, (17, 6))
    total = sum(17 * int((c * c).sum()) - int(c.sum()) ** 2 for c in x.T)
    expected = 17 * int((noise * noise).sum()) / total
    target = torch.as_tensor(x + int(offset), dtype=torch.float32)
    preds = torch.as_tensor(x + noise + int(offset), dtype=torch.float32)
    assert fvu(list(zip(preds.split(sizes), target.split(sizes), strict=True))).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_processes_are_merged_about_their_own_means():
    """As torchmetrics puts their states together: one behind the other."""
    preds, x = data(offset=1e5)
    parts = [FractionVarianceUnexplained() for _ in range(3)]
    for part, rows in zip(parts, ([0, 1], range(2, 9), range(9, 17)), strict=True):
        part.update(preds[list(rows)], x[list(rows)])
    whole = FractionVarianceUnexplained()
    whole.moments = torch.cat([row for part in parts for row in part.moments])
    whole._update_count = 1
    assert whole.compute().item() == pytest.approx(fvu([(preds, x)]).item(), rel=1e-6)
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    assert len(parts[0].moments) == 1
    assert parts[0].compute().item() == pytest.approx(fvu([(preds, x)]).item(), rel=1e-6)


def test_examples_of_several_sizes_have_a_mean_for_each_size():
    pairs = [data(9, (2, 3)), data(5, (4,)), data(7, (2, 3))]
    small, large = data(5, (4,)), tuple(torch.cat(both) for both in zip(pairs[0], pairs[2], strict=True))
    pairs[1] = small
    error = sum((p - x).square().sum().item() for p, x in (small, large))
    total = sum((x - x.mean(0)).square().sum().item() for _, x in (small, large))
    assert fvu(pairs).item() == pytest.approx(error / total, rel=1e-5)
    metric = FractionVarianceUnexplained()
    for pair in pairs:
        metric(*pair)
    assert metric.compute().item() == pytest.approx(error / total, rel=1e-5)


def test_shapes_that_differ_are_an_error_and_empty_batches_are_none():
    metric = FractionVarianceUnexplained()
    with pytest.raises(ValueError, match=r"preds: expected reconstructions \(2, 3\), got \(2, 1\)"):
        metric.update(torch.zeros(2, 1), torch.zeros(2, 3))
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    preds, x = data()
    metric.update(preds, x)
    assert metric.compute().item() == pytest.approx(fvu([(preds, x)]).item())
