"""What is given up, and what is waited for, by looks that are written down."""

from __future__ import annotations

import math

import pytest

import lightning_ae as ae
from lightning_ae.diagnostics.hopeless import Stood, falls, is_hopeless


@pytest.mark.parametrize(
    ("fall", "planned", "expected"),
    [(0.0, 1000, False), (0.02, 1000, True), (0.02, 200, False), (0.002, 1000, False), (math.nan, 1000, False)],
)
def test_an_error_that_falls_fast_enough_is_waited_for(fall, planned, expected):
    looks = [(50, 9.0), (70, 1.0 + fall), (80, 1.0 + fall / 2), (100, 1.0)]
    # what fell before the last two fifths is not counted; 0.02 in 30 steps leave 0.5 after 900 more
    assert falls([Stood(*look, 1.0) for look in looks], 3, planned) is expected


@pytest.mark.parametrize(
    ("cause", "level", "updates", "expected"),
    [
        ("vanishing_gradient", 1.0, (2e-4, 1e-4, 3e-4), False),  # steps grow
        ("vanishing_gradient", 1.0, (2e-4, 1e-4, 1e-4), True),
        ("vanishing_gradient", 1.0, (1e-3, 1e-3, 1e-3), False),  # the weights may yet move by 0.6 of their size
        ("vanishing_gradient", 1.5, (1e-3, 1e-3, 1e-3), False),
        ("vanishing_gradient", 1.5, (2e-4, 1e-4, 1e-4), True),
        ("weight_decay", 1.0, (2e-4, 1e-4, 3e-4), True),
    ],
)
def test_a_plateau_that_may_be_left_is_waited_for(cause, level, updates, expected):
    finding = ae.Finding("error", "somewhere", "figure", 1.0, 100, "It is so.", "Change it.", cause)
    # what steps were in the beginning is not counted
    looks = [Stood(step, level, update) for step, update in zip((20, 150, 300, 400), (1e-5, *updates), strict=True)]
    assert is_hopeless(finding, looks, 3, 1000) is expected
    assert not is_hopeless(finding, looks, 5, 1000)  # patience
    assert not is_hopeless(finding, looks, 3, 430)  # nothing left to save
