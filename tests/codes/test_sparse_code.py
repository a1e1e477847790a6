"""Sparse codes and their maps against dense float64 arithmetic and autograd."""

from __future__ import annotations

import pytest
import torch

from lightning_ae import SparseCode
from lightning_ae.codes.selection import largest
from lightning_ae.codes.sparse_code import select_from, select_linear


@pytest.fixture
def z():
    values = torch.randn(5, 3, dtype=torch.float64)
    values[1] = 0.0
    indices = torch.stack([torch.randperm(7)[:3] for _ in range(5)])
    return SparseCode(values, indices, 7)


def dense(z):
    """Entry by entry."""
    out = torch.zeros(len(z), z.num_latents, dtype=z.dtype)
    for row, (values, indices) in enumerate(zip(z.values, z.indices, strict=True)):
        for value, index in zip(values, indices, strict=True):
            out[row, index] = value
    return out


def test_it_looks_like_the_tensor_it_stands_for(z):
    expected = dense(z)
    assert torch.equal(z.to_dense(), expected)
    assert z.shape == expected.shape
    assert z.ndim == 2
    assert len(z) == 5
    assert z.dtype == torch.float64
    assert z.device == expected.device
    assert torch.equal(z[1:3].to_dense(), expected[1:3])
    assert torch.equal(z.to(torch.float32).to_dense(), expected.float())
    assert torch.equal(z.fired(), (expected != 0).any(0))


def test_a_prefix_has_the_first_latents_only(z):
    expected = dense(z)
    expected[:, 4:] = 0
    assert torch.equal(z.prefix(4).to_dense(), expected)


def test_detached_it_has_no_graph(z):
    values = z.values.clone().requires_grad_()
    code = SparseCode(values, z.indices, 7)
    assert code.requires_grad
    assert not code.detach().requires_grad


@pytest.mark.parametrize(("values", "indices"), [((2, 3), (2, 2)), ((3,), (3,))])
def test_values_and_indices_that_do_not_fit_are_an_error(values, indices):
    with pytest.raises(ValueError, match=r"SparseCode: expected values and indices \(B, m\), got"):
        SparseCode(torch.zeros(values), torch.zeros(indices, dtype=torch.int64), 4)


def test_atoms_that_do_not_fit_are_an_error(z):
    with pytest.raises(ValueError, match=r"atoms: expected \(7, d\), got \(6, 4\)"):
        z.decode(torch.zeros(6, 4, dtype=torch.float64))


def test_decoding_and_both_gradients_are_those_of_the_dense_product(z):
    atoms = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    values = z.values.clone().requires_grad_()
    grad = torch.randn(5, 4, dtype=torch.float64)
    decoded = SparseCode(values, z.indices, 7).decode(atoms)
    got = torch.autograd.grad(decoded, (values, atoms), grad)
    expected = dense(z) @ atoms
    torch.testing.assert_close(decoded, expected)
    torch.testing.assert_close(got[0], (grad @ atoms.t()).gather(1, z.indices))
    torch.testing.assert_close(got[1], dense(z).t() @ grad)
    assert torch.autograd.gradcheck(lambda v, a: SparseCode(v, z.indices, 7).decode(a), (values, atoms))


def test_the_dense_form_has_a_gradient_too(z):
    values = z.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: SparseCode(v, z.indices, 7).to_dense(), (values,))


def top(h):
    values, indices = largest(h, 3)
    return values.relu(), indices


@pytest.mark.parametrize("num_latents", [12, 4096])
def test_selecting_after_a_linear_map_is_the_dense_map_forward_and_backward(num_latents):
    parts = [
        torch.randn(6, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(num_latents, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(num_latents, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    ]
    grad = torch.randn(6, num_latents, dtype=torch.float64)
    code = select_linear(*parts, top)
    got = torch.autograd.grad((code.to_dense() * grad).sum(), parts)
    x, weight, bias, centre = parts
    h = (x - centre) @ weight.t() + bias
    threshold = h.sort(1, descending=True).values[:, 2:3]
    reference = torch.where(h >= threshold, h.relu(), 0.0)
    torch.testing.assert_close(code.to_dense(), reference)
    for ours, theirs in zip(got, torch.autograd.grad((reference * grad).sum(), parts), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_stay_right_where_encoder_and_decoder_meet():
    parts = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (9,), (4,), (9, 4))]
    x = torch.randn(8, 4, dtype=torch.float64)

    def sparse(weight, bias, centre, atoms):
        return (select_linear(x, weight, bias, centre, top).decode(atoms) - x).square().sum()

    def plain(weight, bias, centre, atoms):
        h = (x - centre) @ weight.t() + bias
        on = h >= h.sort(1, descending=True).values[:, 2:3]
        return ((h.relu() * on) @ atoms - x).square().sum()

    for ours, theirs in zip(
        torch.autograd.grad(sparse(*parts), parts), torch.autograd.grad(plain(*parts), parts), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_selecting_from_what_is_there_is_the_same():
    h = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(9, dtype=torch.float64)
    expected = select_linear(h, torch.eye(9, dtype=torch.float64), zero, zero, top).to_dense()
    code = select_from(h, top).to_dense()
    assert torch.equal(code, expected)
    grad = torch.randn_like(code)
    torch.testing.assert_close(torch.autograd.grad(code, h, grad)[0], torch.where(code > 0, grad, 0.0))


def test_no_dense_code_or_gradient_is_made():
    x, weight = torch.randn(64, 8), torch.randn(4096, 8, requires_grad=True)
    bias, atoms = torch.zeros(4096, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    code = select_linear(x, weight, bias, torch.zeros(8), top)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        loss = code.decode(atoms).square().sum()
        loss.backward()
    assert len(sizes) > 10
    assert max(sizes) <= weight.numel() < 64 * 4096


@pytest.mark.parametrize(("n", "k"), [(5, 5), (40, 3), (2048, 32), (4096, 3), (4097, 3), (8192, 128)])
@pytest.mark.parametrize("distinct", [None, 4])
def test_the_largest_are_those_that_sorting_finds(n, k, distinct):
    h = torch.randn(20, n) if distinct is None else torch.randint(0, distinct, (20, n)).float()
    values, indices = largest(h, k)
    assert torch.equal(values.sort(1).values, h.sort(1).values[:, -k:])
    assert torch.equal(h.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_there_is_nothing_to_be_found_in_an_empty_batch():
    values, indices = largest(torch.zeros(0, 4096), 3)
    assert values.shape == indices.shape == (0, 3)
