"""What comes in is a plain value afterwards, or an error that begins with its name."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lightning_ae import checks

NO_NUMBERS = [
    None,
    True,
    np.bool_(True),
    "1",
    b"1",
    [1.0],
    {},
    1j,
    nn.Linear,
    torch.zeros(2),
    torch.tensor(1j),
    object(),
]
NUMBERS = [
    2,
    2.0,
    np.float16(2),
    np.int8(2),
    np.uint64(2),
    Fraction(2),
    torch.tensor(2.0),
    torch.tensor(2),
    np.array(2.0),
]


@pytest.mark.parametrize("check", [checks.check_finite, checks.check_positive, checks.check_non_negative])
def test_numbers_of_all_kinds_become_plain_ones(check):
    for number in NUMBERS:
        assert check("beta", number) == 2
        assert type(check("beta", number)) in (int, float)
    for value in NO_NUMBERS:
        with pytest.raises(TypeError, match=r"^beta: expected a .* got "):
            check("beta", value)


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, 1e39, 2**200, np.float32("nan"), torch.tensor(math.nan)]
)
def test_a_number_that_is_not_finite_in_single_precision_is_none(number):
    for check in (checks.check_finite, checks.check_positive, checks.check_non_negative, checks.check_share):
        with pytest.raises(ValueError, match=r"^beta: expected a "):
            check("beta", number)


def test_where_infinity_has_a_meaning_it_is_taken():
    assert checks.check_positive("prior_variance", math.inf, finite=False) == math.inf
    assert checks.check_non_negative("threshold", math.inf, finite=False) == math.inf
    with pytest.raises(ValueError, match="threshold: expected a number >= 0, got nan"):
        checks.check_non_negative("threshold", math.nan, finite=False)


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [("[]", [0, 1, 0.5], [-0.1, 1.1]), ("[)", [0], [1]), ("(]", [1], [0]), ("()", [0.5], [0, 1])],
)
def test_a_share_has_the_ends_it_is_told(ends, inside, outside):
    for number in inside:
        assert checks.check_share("p", number, ends) == number
    for number in outside:
        with pytest.raises(ValueError, match=f"^p: expected a number in \\{ends[0]}0, 1\\{ends[1]}, got {number}"):
            checks.check_share("p", number, ends)


def test_whole_numbers_are_no_floats_nor_booleans():
    for number in (3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)):
        assert checks.check_whole("k", number) == 3
        assert type(checks.check_whole("k", number)) is int
    for value in (*NO_NUMBERS, 3.0, np.float64(3), torch.tensor(3.0)):
        with pytest.raises(TypeError, match=r"^k: expected a positive whole number, got "):
            checks.check_whole("k", value)
    with pytest.raises(ValueError, match="k: expected a positive whole number, got 0"):
        checks.check_whole("k", 0)
    with pytest.raises(ValueError, match=f"k: expected a positive whole number and <= {2**63 - 1}, got {2**63}"):
        checks.check_whole("k", 2**63)


def test_seeds_are_whole_and_as_large_as_a_generator_takes():
    assert checks.check_seed("seed", 0) == 0
    torch.Generator().manual_seed(checks.check_seed("seed", 2**63 - 1))
    np.random.default_rng(checks.check_seed("seed", 2**32 - 1, most=2**32 - 1))
    for value, error in (("0", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError), (2**64, ValueError)):
        with pytest.raises(error, match=r"^seed: expected a whole number >= 0"):
            checks.check_seed("seed", value)


def test_flags_are_true_or_false_and_no_texts():
    assert [checks.check_flag("bias", value) for value in (True, False, 1, 0, np.bool_(True), torch.tensor(False))] == [
        *(True, False, True, False, True, False)
    ]
    for value in ("no", "False", None, 2, 0.0, [], torch.zeros(2)):
        with pytest.raises(TypeError, match=r"^bias: expected True or False, got "):
            checks.check_flag("bias", value)


def test_names_are_compared_by_type_too():
    assert checks.check_one_of("together", True, (True, False, "auto")) is True
    for value, error in ((1, TypeError), ("x", ValueError), (None, TypeError), (["auto"], TypeError)):
        with pytest.raises(error, match=r"^together: expected True, False or 'auto', got "):
            checks.check_one_of("together", value, (True, False, "auto"))


def test_a_class_instead_of_its_instance_is_called_one():
    with pytest.raises(TypeError, match=r"^encoder: expected a Module, got the class Linear"):
        checks.check_type("encoder", nn.Linear, nn.Module, None)
    checks.check_type("encoder", None, nn.Module, None)


def test_sequences_have_an_end_and_are_no_texts():
    assert checks.check_sequence("channels", (n for n in (1, 2))) == [1, 2]
    assert checks.check_sequence("channels", np.array([1, 2])) == [1, 2]
    for value in ("12", b"12", 12, None, {1: 2}, {1}, torch.tensor(1), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match=r"^channels: expected a sequence of numbers, got "):
            checks.check_sequence("channels", value)


def test_tensors_are_real_and_dense():
    checks.check_tensor("x", torch.zeros(2, dtype=torch.bool))
    for value in (None, [1.0], np.zeros(2), torch.zeros(2) + 0j, torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match=r"^x: expected "):
            checks.check_tensor("x", value)
    with pytest.raises(ValueError, match=r"^x: expected a batch \(B, D, \.\.\.\), got a tensor of shape \(2,\)"):
        checks.check_tensor("x", torch.zeros(2), least_dims=2)
    with pytest.raises(TypeError, match=r"^x: expected floating-point numbers, got torch.int64.* x\.float\(\)"):
        checks.check_floating("x", torch.zeros(2, dtype=torch.int64))
