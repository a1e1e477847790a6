"""TopK and BatchTopK against the plain dense definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightning_ae as ae
from lightning_ae import BatchTopKCode, TopKCode


def top_k(h, k):
    """NumPy, row by row."""
    out = np.zeros_like(h)
    for row in range(len(h)):
        for i in np.argsort(-h[row], kind="stable")[:k]:
            out[row, i] = max(0.0, h[row, i])
    return out


def batch_top_k(h, k):
    """NumPy, over the whole batch."""
    flat = h.flatten()
    out = np.zeros_like(flat)
    best = np.argsort(-flat, kind="stable")[: k * len(h)]
    out[best] = np.maximum(0.0, flat[best])
    return out.reshape(h.shape)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_top_k_keeps_the_k_largest_if_positive(k):
    h = torch.randn(10, 16, dtype=torch.float64)
    output = TopKCode(k)(h)
    np.testing.assert_array_equal(output.z.numpy(), top_k(h.numpy(), k))
    assert output.penalties == {}


def test_ties_never_turn_more_than_k_on():
    z = TopKCode(3)(torch.ones(4, 8)).z
    assert z.count_nonzero(1).tolist() == [3, 3, 3, 3]


def test_nothing_positive_is_a_code_of_zeros_and_no_gradient():
    h = (-torch.rand(4, 8)).requires_grad_()
    for code in (TopKCode(3), BatchTopKCode(3)):
        z = code(h).z
        assert z.count_nonzero() == 0
        assert torch.autograd.grad(z.sum(), h)[0].count_nonzero() == 0


@pytest.mark.parametrize("code", [TopKCode(2), BatchTopKCode(2)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_has_an_empty_code(code, training):
    assert code.train(training)(torch.zeros(0, 8)).z.shape == (0, 8)
    assert code.encode(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
@pytest.mark.parametrize("code", [TopKCode, BatchTopKCode])
def test_a_k_that_is_no_positive_whole_number_is_an_error(code, k):
    error = ValueError if type(k) is int else TypeError
    with pytest.raises(error, match=r"^k: expected a positive whole number, got"):
        code(k)


@pytest.mark.parametrize("code", [TopKCode(9), BatchTopKCode(9)])
def test_a_k_larger_than_the_code_is_an_error(code):
    with pytest.raises(ValueError, match="k: expected at most the 8 latents there are, got 9"):
        code(torch.randn(2, 8))


def test_a_map_is_an_error():
    with pytest.raises(ValueError, match=r"h: expected pre-activations \(B, n\), got \(2, 3, 4, 4\)"):
        TopKCode(1)(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(("options", "message"), [({"width": 1}, "width: expected"), ({"momentum": 1.0}, "momentum")])
def test_options_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        BatchTopKCode(2, **options)


def test_batch_top_k_keeps_the_largest_of_the_batch():
    h = torch.randn(10, 16, dtype=torch.float64) * torch.linspace(0.1, 2, 10, dtype=torch.float64)[:, None]
    z = BatchTopKCode(3, width=16)(h).z
    np.testing.assert_array_equal(z.numpy(), batch_top_k(h.numpy(), 3))
    assert z.count_nonzero() == 30
    assert len(set(z.count_nonzero(1).tolist())) > 1


def test_batch_top_ks_gradient_goes_to_what_was_kept():
    h = torch.randn(10, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(10, 16, dtype=torch.float64)
    z = BatchTopKCode(3, width=16)(h).z
    expected = torch.from_numpy(batch_top_k(h.detach().numpy(), 3)) > 0
    torch.testing.assert_close(torch.autograd.grad(z, h, grad)[0], torch.where(expected, grad, 0.0))


def test_no_example_uses_more_than_the_width():
    h = torch.rand(4, 16) * 0.1
    h[0] += 10
    z = BatchTopKCode(3, width=5)(h).z
    assert z.count_nonzero(1).tolist()[0] == 5
    assert z.count_nonzero() == 12


def test_the_threshold_is_the_running_mean_of_the_smallest_kept():
    code = BatchTopKCode(2, width=16, momentum=0.9)
    expected = None
    for t in range(5):
        h = torch.randn(8, 16).abs()
        code(h)
        least = np.sort(h.numpy().flatten())[-16]
        momentum = min(0.9, (1 + t) / (10 + t))
        expected = least if expected is None else momentum * expected + (1 - momentum) * least
    assert code.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_the_threshold_forgets_what_the_code_was_at_first():
    code, h = BatchTopKCode(4), torch.rand(64, 32)
    for step in range(300):
        code(h * (0.1 + 0.9 * 0.97**step))  # it falls to a tenth
    least = (0.1 * h).flatten().sort(descending=True).values[4 * 64 - 1]
    assert float(code.threshold) == pytest.approx(float(least), rel=0.05)
    kept = (code.encode(0.1 * h) > 0).sum(1).double().mean()
    assert float(kept) == pytest.approx(4.0, rel=0.2)


def test_at_inference_the_threshold_decides_alone():
    code = BatchTopKCode(2, width=16)
    code(torch.randn(8, 16))
    tau = code.threshold.clone()
    h = torch.randn(20, 16)
    expected = torch.where(h >= tau, h.relu(), 0.0)
    assert torch.equal(code.encode(h), expected)
    assert torch.equal(code.encode(h[:1]), expected[:1])
    assert torch.equal(code.eval()(h).z, expected)
    assert torch.equal(code.threshold, tau)


def test_a_batch_of_which_nothing_is_kept_does_not_move_the_threshold():
    code = BatchTopKCode(2)
    code(-torch.rand(4, 8))
    assert code.threshold < 0
    code(torch.rand(4, 8))
    tau = code.threshold.clone()
    code(-torch.rand(4, 8))
    assert torch.equal(code.threshold, tau)


def test_before_any_training_batch_top_k_is_top_k():
    h = torch.randn(5, 16)
    np.testing.assert_array_equal(BatchTopKCode(3).encode(h).numpy(), top_k(h.numpy(), 3))


@pytest.mark.parametrize("code", [TopKCode(2), BatchTopKCode(2)])
def test_any_autoencoder_takes_them(code, make_trainer, tmp_path):
    model = ae.MLPAutoencoder(6, 8, hidden=(12,), code=code)
    trainer = make_trainer()
    trainer.fit(model, ae.TensorDataModule(torch.randn(64, 6), batch_size=16))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ae.load(tmp_path / "m.ckpt").eval()
    x = torch.randn(4, 6)
    z = again.encode(x)
    assert isinstance(z, torch.Tensor)
    assert torch.equal(z, model.eval().encode(x))
    if isinstance(code, BatchTopKCode):
        assert again.code.threshold > 0
    else:
        assert z.count_nonzero(1).max() <= 2


def test_the_threshold_moves_in_a_model_made_bfloat16():
    code = BatchTopKCode(2, momentum=0.99).to(torch.bfloat16)
    h = torch.rand(8, 20).bfloat16()
    code(h)
    expected = float(code.threshold)
    for t in range(1, 21):
        code(2 * h)
        momentum = min(0.99, (1 + t) / (10 + t))
        expected = momentum * expected + (1 - momentum) * 2 * float(
            h.float().flatten().sort(descending=True).values[15]
        )
    assert code.threshold.dtype == torch.float32
    assert code.encode(h).dtype == torch.bfloat16
    assert float(code.threshold) == pytest.approx(expected, rel=1e-4)
