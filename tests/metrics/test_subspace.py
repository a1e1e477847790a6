"""Principal angles against SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from lightning_ae import SubspaceAngle, subspace_angles

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13}
EACH_DTYPE = pytest.mark.parametrize(("dtype", "atol"), DTYPES.items(), ids=str)


@EACH_DTYPE
@pytest.mark.parametrize(("d", "k", "m"), [(10, 3, 3), (10, 5, 2), (10, 2, 5), (4, 3, 3), (7, 7, 2), (3, 1, 1)])
def test_angles_are_scipys(d, k, m, dtype, atol):
    a, b = torch.randn(d, k, dtype=dtype), torch.randn(d, m, dtype=dtype)
    expected = linalg.subspace_angles(a.double().numpy(), b.double().numpy())
    angles = subspace_angles(a, b)
    assert angles.shape == (min(k, m),)
    np.testing.assert_allclose(angles, expected, atol=10 * atol)


@EACH_DTYPE
@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.1, math.pi / 4, 1.0, math.pi / 2 - 1e-3, math.pi / 2])
def test_an_angle_made_by_rotation_is_found(angle, dtype, atol):
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    a = q[:, :3]
    b = torch.stack([q[:, 0], q[:, 1], math.cos(angle) * q[:, 2] + math.sin(angle) * q[:, 5]], 1)
    mixed = b @ torch.randn(3, 3, dtype=torch.float64)  # the span is the same
    found = subspace_angles(a.to(dtype), mixed.to(dtype))
    assert found[0].item() == pytest.approx(angle, abs=5 * atol)
    assert found[1:].abs().max().item() < 5 * atol


def test_tiny_angles_keep_their_digits():
    # the cosine of 1e-10 is one in double precision
    for angle in (1e-6, 1e-8, 1e-10):
        b = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]], dtype=torch.float64)
        found = subspace_angles(torch.eye(3, 1, dtype=torch.float64), b)
        assert found.item() == pytest.approx(angle, rel=1e-5)


def test_angles_under_autocast_are_those_without():
    a = torch.randn(9, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        angles = subspace_angles(a, a.flip(1))
    assert angles.max() < 1e-5


@pytest.mark.parametrize("shapes", [((4,), (4, 2)), ((4, 2), (5, 2)), ((2, 4, 2), (4, 2))])
def test_other_shapes_are_an_error_that_names_both(shapes):
    with pytest.raises(ValueError, match=r"a and b: expected two matrices .* with as many rows, got"):
        subspace_angles(*(torch.ones(shape) for shape in shapes))


def test_the_metric_is_the_largest_angle_of_the_last_update():
    reference, first, last = torch.randn(3, 9, 4)
    metric = SubspaceAngle(reference)
    metric.update(first)
    metric.update(last)
    expected = linalg.subspace_angles(reference.double().numpy(), last.double().numpy()).max()
    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)


def test_the_metric_takes_another_dtype_and_keeps_its_reference():
    reference = torch.randn(9, 4)
    metric = SubspaceAngle(reference)
    metric.update(reference.double() @ torch.randn(4, 4, dtype=torch.float64))
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)
    before = metric.reference.clone()
    reference.zero_()
    assert torch.equal(metric.reference, before)


def test_a_reference_that_is_no_matrix_is_an_error():
    with pytest.raises(ValueError, match=r"reference: expected a matrix \(d, k\), got \(3,\)"):
        SubspaceAngle(torch.ones(3))
