import sys

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_ae.data import DigitsDataModule


def gather(loader):
    xs, ys = zip(*loader, strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_splits_are_the_digits_of_scikit_learn_each_once():
    data = DigitsDataModule(val_fraction=0.1, test_fraction=0.2, flat=True)
    parts = [gather(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(x) for x, _ in parts] == [1294, 144, 359]
    found = torch.cat([torch.cat([x, y[:, None]], dim=1) for x, y in parts])
    pixels, labels = load_digits(return_X_y=True)
    expected = torch.cat([torch.tensor(pixels) / 16, torch.tensor(labels)[:, None]], dim=1).float()
    assert torch.unique(found, dim=0).equal(torch.unique(expected, dim=0))
    assert len(found) == len(expected)


@pytest.mark.parametrize(("flat", "shape"), [(True, (64,)), (False, (1, 8, 8))])
def test_batches_have_the_announced_form(flat, shape):
    data = DigitsDataModule(batch_size=32, flat=flat)
    x, y = next(iter(data.train_dataloader()))
    assert data.in_shape == shape
    assert x.shape == (32, *shape)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)


def test_the_seed_decides_the_test_split():
    tests = [gather(DigitsDataModule(seed=seed).test_dataloader())[0] for seed in (0, 0, 1)]
    assert tests[0].equal(tests[1])
    assert not tests[0].equal(tests[2])


def test_without_a_test_fraction_there_is_no_test_split():
    data = DigitsDataModule(test_fraction=0, val_fraction=0)
    assert data.num_train_examples == 1797
    with pytest.raises(ValueError, match="test: this DigitsDataModule has no such split"):
        data.test_dataloader()


def test_a_fraction_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"test_fraction: expected a number in \[0, 1\), got 1"):
        DigitsDataModule(test_fraction=1)


def test_missing_scikit_learn_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-ae\[recipes\]"'):
        DigitsDataModule().setup()
