"""Gated codes against a plain float64 implementation of the paper's loss."""

import copy

import pytest
import torch

from lightning_ae import Autoencoder, GatedCode, LinearDecoder, LinearEncoder, TensorDataModule


def paper(x, w_gate, b_gate, r_mag, b_mag, w_dec, b_dec, lam):
    """Loss of each example; x (B, d), w_gate (d, k), w_dec (k, d), with the input not centred."""
    pi = x @ w_gate + b_gate
    magnitudes = torch.relu(x @ (w_gate * r_mag.exp()) + b_mag)
    z = (pi > 0).to(x.dtype) * magnitudes
    x_hat = z @ w_dec + b_dec
    frozen = torch.relu(pi) @ w_dec.detach() + b_dec.detach()
    squared = (x - x_hat).square().sum(1)
    return z, squared + lam * torch.relu(pi).sum(1) + (x - frozen).square().sum(1)


def test_objective_and_gradients_equal_the_paper():
    torch.manual_seed(4)
    x = torch.randn(30, 5, dtype=torch.float64)
    model = Autoencoder(LinearEncoder(5, 9), LinearDecoder(9, 5), code=GatedCode(9, weight=0.3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    encoder, decoder, code = model.encoder, model.decoder, model.code
    # the paper's magnitudes have a bias of their own, ours the gate's as well
    leaves = {
        "w_gate": encoder.weight.detach().T.clone(),
        "b_gate": encoder.bias.detach().clone(),
        "r_mag": code.log_gain.detach().clone(),
        "b_mag": (code.bias + code.log_gain.exp() * encoder.bias).detach().clone(),
        "w_dec": decoder.weight.detach().T.clone(),
        "b_dec": decoder.layer.bias.detach().clone(),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    z, expected = paper(x, **leaves, lam=0.3)
    expected.mean().backward()

    output = model(x)
    loss = model.objective(model.terms(x, output))
    torch.testing.assert_close(output.z, z)
    torch.testing.assert_close(loss, expected)
    loss.mean().backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    gain = code.log_gain.detach().exp()
    torch.testing.assert_close(encoder.weight.grad.T, grads["w_gate"])
    torch.testing.assert_close(decoder.weight.shape, grads["w_dec"].T.shape)
    torch.testing.assert_close(decoder.layer.weight.grad.T, grads["w_dec"])
    torch.testing.assert_close(decoder.layer.bias.grad, grads["b_dec"])
    torch.testing.assert_close(code.bias.grad, grads["b_mag"])
    torch.testing.assert_close(encoder.bias.grad, grads["b_gate"] + gain * grads["b_mag"])
    torch.testing.assert_close(code.log_gain.grad, grads["r_mag"] + gain * encoder.bias.detach() * grads["b_mag"])


def test_the_auxiliary_term_has_no_gradient_in_the_decoder_and_is_logged(make_trainer):
    x = torch.randn(16, 5)
    model = Autoencoder(LinearEncoder(5, 9), LinearDecoder(9, 5), code=GatedCode(9, weight=0.3))
    model.terms(x, model(x))["gate"].sum().backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert model.encoder.weight.grad.abs().sum() > 0
    trainer = make_trainer(max_epochs=1, logger=False)
    trainer.fit(model, TensorDataModule(x.repeat(4, 1), batch_size=16, val_fraction=0.25))
    assert {"val/gate", "val/l1", "train/gate_epoch"} <= set(trainer.callback_metrics)


def test_magnitudes_are_not_shrunk():
    code = GatedCode(2, weight=5.0)
    assert code.encode(torch.tensor([[2.0, -1.0]])).tolist() == [[2.0, 0.0]]
    with torch.no_grad():
        code.bias.copy_(torch.tensor([1.0, 3.0]))
    assert code.encode(torch.tensor([[2.0, -1.0]])).tolist() == [[3.0, 0.0]]  # closed gates stay closed


def test_a_model_can_be_copied_after_a_step():
    model = Autoencoder(LinearEncoder(5, 9), LinearDecoder(9, 5), code=GatedCode(9, weight=0.3))
    model.training_step(torch.randn(4, 5), 0)["loss"].backward()
    again = copy.deepcopy(model)
    assert torch.equal(again.encoder.weight, model.encoder.weight)


def test_the_auxiliary_term_needs_a_forward_pass():
    with pytest.raises(ValueError, match="belongs to a forward pass"):
        GatedCode(3, 1.0).auxiliary(lambda z: z.sum(1))
