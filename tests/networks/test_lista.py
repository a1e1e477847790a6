"""Unrolled inference against plain ISTA and the minimum it unrolls to."""

import itertools

import pytest
import torch
from torch.nn import functional

from lightning_ae import L1Code, LinearDecoder, LISTAEncoder, SparseAutoencoder, load, soft_threshold, sparse_encode


def ista(x, dictionary, weight, steps):
    """Proximal gradient steps as the textbook writes them, from zero."""
    lipschitz = 2 * torch.linalg.svdvals(dictionary)[0] ** 2
    z = torch.zeros(len(x), dictionary.shape[1], dtype=x.dtype)
    for _ in range(steps):
        gradient = 2 * (z @ dictionary.T - x) @ dictionary
        z = soft_threshold(z - gradient / lipschitz, (weight / lipschitz).item())
    return z


def problem(features=8, atoms=20, bias=False):
    torch.manual_seed(0)
    decoder = LinearDecoder(atoms, features, bias=bias).double()
    with torch.no_grad():
        decoder.weight.copy_(functional.normalize(torch.randn_like(decoder.weight), dim=0))
    return torch.randn(30, features, dtype=torch.float64), decoder


def objective(x, z, dictionary, weight):
    return (x - z @ dictionary.T).square().sum(1) + weight * z.abs().sum(1)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_tied_and_untrained_steps_are_those_of_ista(steps):
    x, decoder = problem()
    expected = ista(x, decoder.weight, 0.4, steps)
    tied = LISTAEncoder(8, 20, 0.4, steps, tied_to=decoder).double()
    # the largest singular value is estimated: a little short of it after some iterations
    torch.testing.assert_close(tied(x), expected, atol=2e-3, rtol=0)
    learned = LISTAEncoder(8, 20, 0.4, steps, dictionary=decoder.weight.detach()).double()
    torch.testing.assert_close(learned(x), expected, atol=2e-3, rtol=0)


def test_many_steps_reach_the_lasso():
    x, decoder = problem(bias=True)
    with torch.no_grad():
        decoder.layer.bias.normal_()
    centred, dictionary = (x - decoder.layer.bias).detach(), decoder.weight.detach()
    least = objective(centred, sparse_encode(centred, dictionary, 0.4, tolerance=1e-13), dictionary, 0.4).mean()
    with torch.no_grad():
        excess = [
            objective(centred, LISTAEncoder(8, 20, 0.4, steps, tied_to=decoder).double()(x), dictionary, 0.4).mean()
            - least
            for steps in (10, 100, 1000, 3000)
        ]
    assert all(a > 2 * b for a, b in itertools.pairwise(excess))  # ISTA is slow, but gets there
    assert 0 <= excess[-1] < 1e-4 * least


def test_training_ends_nearer_the_minimum_than_ista_in_as_many_steps():
    _, decoder = problem()
    dictionary = decoder.weight.detach().float()
    on = torch.rand(2000, 20) < 0.15
    x = (on * torch.randn(2000, 20)) @ dictionary.T
    train, held_out = x[:1500], x[1500:]
    encoder = LISTAEncoder(8, 20, 0.2, 4, dictionary=dictionary)
    least = objective(held_out, sparse_encode(held_out, dictionary, 0.2), dictionary, 0.2).mean()
    before = objective(held_out, encoder(held_out), dictionary, 0.2).mean() - least
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        objective(train, encoder(train), dictionary, 0.2).mean().backward()
        optimizer.step()
    after = objective(held_out, encoder(held_out), dictionary, 0.2).mean() - least
    assert 0 <= after < 0.5 * before


def test_a_tied_encoder_has_no_weights_and_follows_the_dictionary(make_trainer, tmp_path):
    decoder = LinearDecoder(20, (2, 4))
    encoder = LISTAEncoder((2, 4), 20, 0.3, 5, tied_to=decoder)
    assert list(encoder.parameters()) == []
    model = SparseAutoencoder(encoder, decoder, L1Code(0.3), unit_norm=True, lr=1e-2)
    x = torch.randn(64, 2, 4)
    before = model.encode(x)
    trainer = make_trainer(max_epochs=3)
    trainer.fit(model, torch.utils.data.DataLoader(x, batch_size=16))
    after = model.encode(x)
    assert not torch.allclose(before, after)
    flat = x.flatten(1) - decoder.layer.bias
    torch.testing.assert_close(after, ista(flat, decoder.weight, 0.3, 5).float(), atol=2e-3, rtol=0)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = load(tmp_path / "model.ckpt")
    assert again.encoder._decoder[0] is again.decoder
    assert torch.equal(again.encode(x), after)


def test_a_learned_encoder_rebuilds(make_trainer, tmp_path):
    encoder, decoder = LISTAEncoder(8, 20, 0.3, dictionary=torch.randn(8, 20)), LinearDecoder(20, 8)
    model = SparseAutoencoder(encoder, decoder, L1Code(0.3))
    x = torch.randn(64, 8)
    trainer = make_trainer()
    trainer.fit(model, torch.utils.data.DataLoader(x, batch_size=16))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(load(tmp_path / "model.ckpt").encode(x), model.encode(x))


def test_gradients_reach_the_dictionary_through_the_steps():
    x, decoder = problem()
    encoder = LISTAEncoder(8, 20, 0.4, 3, tied_to=decoder).double()
    encoder(x).square().sum().backward()
    ours = decoder.layer.weight.grad.clone()
    leaf = decoder.weight.detach().clone().requires_grad_()
    step = 1 / torch.linalg.svdvals(leaf.detach())[0] ** 2  # a constant, as in the encoder
    z = torch.zeros(30, 20, dtype=torch.float64)
    for _ in range(3):
        z = soft_threshold(z - step * (z @ leaf.T - x) @ leaf, (step * 0.2).item())
    z.square().sum().backward()
    torch.testing.assert_close(ours, leaf.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_it_compiles_and_works_under_autocast(tied):
    torch._dynamo.reset()
    _, decoder = problem()
    decoder = decoder.float()
    encoder = LISTAEncoder(8, 20, 0.4, tied_to=decoder) if tied else LISTAEncoder(8, 20, 0.4)
    x = torch.randn(5, 8)
    torch.testing.assert_close(torch.compile(encoder, backend="aot_eager", fullgraph=True)(x), encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(x).float(), encoder(x.float()).float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight: expected a finite number >= 0, got -1"),
        ({"weight": 0.1, "num_steps": 0}, "num_steps"),
        ({"weight": 0.1, "tied_to": LinearDecoder(5, 8)}, r"tied_to: expected a dictionary \(8, 20\), got \(8, 5\)"),
        ({"weight": 0.1, "dictionary": torch.ones(20, 8)}, r"dictionary: expected a dictionary \(8, 20\)"),
        ({"weight": 0.1, "dictionary": torch.ones(8, 20), "tied_to": LinearDecoder(20, 8)}, "give one of the two"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LISTAEncoder(8, 20, **options)
