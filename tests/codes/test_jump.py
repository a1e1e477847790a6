"""JumpReLU against a plain float64 implementation, and what its coefficient does."""

import pytest
import torch
from torch.nn import functional

from lightning_ae import Autoencoder, JumpReLUCode, LinearDecoder, LinearEncoder


def reference(h, theta, bandwidth, grad_z, grad_l0):
    """Values and straight-through gradients, one number at a time as the paper writes them; ``h`` is ``(B, n)``."""
    z, l0 = torch.zeros_like(h), torch.zeros(len(h), dtype=h.dtype)
    grad_h, grad_theta = torch.zeros_like(h), torch.zeros_like(theta)
    for b in range(h.shape[0]):
        for i in range(h.shape[1]):
            epsilon = bandwidth * theta[i]
            kernel = 1.0 if -0.5 < (h[b, i] - theta[i]) / epsilon < 0.5 else 0.0
            if h[b, i] > theta[i]:
                z[b, i] = h[b, i]
                l0[b] += 1
                grad_h[b, i] = grad_z[b, i]
            grad_theta[i] -= theta[i] / epsilon * kernel * grad_z[b, i] + kernel / epsilon * grad_l0[b]
    return z, l0, grad_h, grad_theta


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_forward_and_straight_through_backward_equal_the_paper(dtype, tolerance):
    torch.manual_seed(3)
    h = torch.rand(20, 7, dtype=torch.float64) * 2
    theta = torch.rand(7, dtype=torch.float64) + 0.3
    h[0, 0] = theta[0]  # a tie is off
    grad_z, grad_l0 = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    expected = reference(h, theta, 0.6, grad_z, grad_l0)

    code = JumpReLUCode(7, weight=1.0, init_threshold=0.5, bandwidth=0.6).to(dtype)
    code.set_threshold(theta.to(dtype))
    torch.testing.assert_close(code.threshold, theta.to(dtype), rtol=tolerance, atol=0)
    code.log_scale.data = (theta / 0.5).log().to(dtype) / 16
    leaf = h.to(dtype).requires_grad_()
    z, penalties = code(leaf)
    ((z * grad_z).sum() + (penalties["l0"] * grad_l0).sum()).backward()
    if dtype == torch.float64:  # in single precision the tie falls either way
        assert z[0, 0] in (0, h[0, 0])
    mask = torch.ones_like(h, dtype=torch.bool)
    mask[0, 0] = False
    torch.testing.assert_close(z[mask].double(), expected[0][mask], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(penalties["l0"][1:].double(), expected[1][1:])
    torch.testing.assert_close(leaf.grad[mask].double(), expected[2][mask], rtol=tolerance, atol=tolerance)
    # the parameter is ρ of θ = θ₀ exp(16 ρ)
    torch.testing.assert_close(code.log_scale.grad.double(), 16 * theta * expected[3], rtol=1e-4, atol=1e-4)


def test_a_latent_at_its_threshold_is_off():
    code = JumpReLUCode(1, weight=1.0, init_threshold=0.5)
    h = torch.tensor([[0.5], [0.50001], [-3.0]])
    assert code(h).z.flatten().tolist() == [0, pytest.approx(0.50001), 0]
    assert code(h).penalties["l0"].tolist() == [0, 1, 0]


def test_the_estimated_gradient_is_that_of_the_expectation():
    # h uniform on (0, 2): E‖z‖₀ = 1 − θ/2 and E z = 1 − θ²/4
    h = (torch.arange(200_000, dtype=torch.float64)[:, None] + 0.5) / 100_000
    code = JumpReLUCode(1, weight=1.0, init_threshold=0.8).double()
    for charge, slope in (("l0", -0.5), ("z", -0.4)):
        code.zero_grad()
        z, penalties = code(h)
        (penalties["l0"] if charge == "l0" else z).mean().backward()
        assert code.log_scale.grad.item() / (16 * 0.8) == pytest.approx(slope, rel=1e-3)


def test_the_gradient_of_a_gradient_exists():
    # the Jacobian penalty differentiates dz/dh
    code = JumpReLUCode(3, weight=1.0, init_threshold=0.1)
    h = torch.rand(4, 3, requires_grad=True)
    weight = torch.ones(4, 3, requires_grad=True)
    (slope,) = torch.autograd.grad((code(h).z * weight).sum(), h, create_graph=True)
    slope.sum().backward()
    assert torch.equal(weight.grad, (h > 0.1).float())


def test_it_works_under_vmap():
    h = torch.rand(3, 4, 5)
    code = JumpReLUCode(5, weight=1.0, init_threshold=0.5)
    assert torch.equal(torch.func.vmap(code.encode)(h), torch.where(h > 0.5, h, 0))


def superposed(count, seed, atoms=128, features=32, active=6):
    """Sparse sums of unit-norm atoms in fewer dimensions."""
    generator = torch.Generator().manual_seed(0)
    dictionary = functional.normalize(torch.randn(atoms, features, generator=generator), dim=1)
    generator.manual_seed(seed)
    on = torch.rand(count, atoms, generator=generator) < active / atoms
    return (on * (0.5 + torch.rand(count, atoms, generator=generator))) @ dictionary


def trained_l0(code, steps, batch_size=256, lr=1e-3, dtype=torch.float32):
    """Active latents on held-out data after training a dictionary with unit-norm atoms by Adam."""
    torch.manual_seed(0)
    x, held_out = superposed(8192, 1).to(dtype), superposed(1000, 2).to(dtype)
    encoder, decoder = LinearEncoder(32, 128), LinearDecoder(128, 32)
    with torch.no_grad():
        decoder.weight.copy_(functional.normalize(decoder.weight, dim=0))
        encoder.weight.copy_(decoder.weight.T)
    model = Autoencoder(encoder, decoder, code=code).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model.training_step(x[torch.randint(len(x), (batch_size,))], 0)["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            decoder.weight.copy_(functional.normalize(decoder.weight, dim=0))
    return (model.eval().encode(held_out) != 0).sum(1).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_coefficient_moves_l0_over_its_whole_range(dtype):
    free, *l0 = [trained_l0(JumpReLUCode(128, weight), 500, dtype=dtype) for weight in (0, 1e-3, 0.03, 0.3, 100)]
    assert all(a > b for a, b in zip([free, *l0], l0, strict=False))
    assert l0[0] > 0.9 * free > 30  # next to nothing
    assert 3 < l0[2] < 8
    assert l0[-1] < 0.1  # all of it


@pytest.mark.parametrize("target", [6, 32])
def test_a_target_is_met_within_a_tenth(target):
    code = JumpReLUCode(128, weight=0.1, target_l0=target)
    assert trained_l0(code, 1000) == pytest.approx(target, rel=0.1)
    assert float(code.weights()["l0"]) != 0.1


def test_thresholds_stay_in_single_precision():
    code = JumpReLUCode(4, 1.0).to(torch.bfloat16)
    assert code.log_scale.dtype == torch.float32
    z, penalties = code(torch.ones(2, 4, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    assert penalties["l0"].dtype == torch.float32
    assert code.double().log_scale.dtype == torch.float64


def test_thresholds_can_be_set():
    code = JumpReLUCode(3, 1.0)
    code.set_threshold(torch.tensor([1e-3, 0.5, 40.0]))
    torch.testing.assert_close(code.threshold, torch.tensor([1e-3, 0.5, 40.0]))
    for bad in (torch.ones(2), torch.tensor([1.0, 0.0, -1.0])):
        with pytest.raises(ValueError, match=r"threshold: expected \(3,\) positive numbers"):
            code.set_threshold(bad)
