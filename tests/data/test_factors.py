"""Images of known factors are what the factors say, and the factors are independent."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import lightning_ae as ae
from lightning_ae.metrics import mutual_information_gap


def test_every_combination_occurs_once():
    x, factors = ae.factor_images(8, positions=3, widths=2, levels=4)
    assert x.shape == (72, 1, 8, 8)
    assert x.dtype == torch.float32
    assert sorted(map(tuple, factors.tolist())) == list(itertools.product(range(3), range(3), range(2), range(4)))


def test_each_pixel_is_that_of_the_formula():
    x, factors = ae.factor_images(16, positions=5, widths=3, levels=2)
    for i in (0, 17, 101, 149):
        r, c, w, b = factors[i].tolist()
        row, column = (16 * (1 / 8 + 3 / 4 * place / 4) for place in (r, c))
        width, level = 16 * (1 / 16 + w / 32), 0.5 + b / 2
        for u, v in [(0, 0), (3, 11), (8, 8), (15, 2)]:
            distance = (u + 0.5 - row) ** 2 + (v + 0.5 - column) ** 2
            assert x[i, 0, u, v].item() == pytest.approx(level * math.exp(-distance / (2 * width**2)), abs=1e-6)
    assert 0 <= x.min() < x.max() <= 1


def test_moments_of_an_image_tell_its_place():
    x, factors = ae.factor_images(32)
    image = x[:, 0].double()
    middle = torch.arange(32) + 0.5
    row = (image.sum(2) @ middle.double()) / image.sum((1, 2))
    column = (image.sum(1) @ middle.double()) / image.sum((1, 2))
    inside = ((factors[:, :2] > 1) & (factors[:, :2] < 6)).all(1)  # near an edge blobs are cut off
    places = torch.linspace(4, 28, 8).double()
    torch.testing.assert_close(row[inside], places[factors[inside, 0]], atol=0.2, rtol=0)
    torch.testing.assert_close(column[inside], places[factors[inside, 1]], atol=0.2, rtol=0)


def test_factors_are_independent():
    factors = ae.factor_images().factors
    assert mutual_information_gap(factors, factors) == pytest.approx(1)
    correlation = np.corrcoef(factors.numpy().T)
    np.testing.assert_allclose(correlation, np.eye(4), atol=1e-12)


def test_errors_at_the_door():
    with pytest.raises(ValueError, match="positions: expected a positive whole number, got 0"):
        ae.factor_images(positions=0)
    with pytest.raises(TypeError, match="size: expected a positive whole number"):
        ae.factor_images(8.0)
