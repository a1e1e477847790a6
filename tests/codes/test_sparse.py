"""Soft-thresholding and the textbook's codes against closed forms, brute force and torch.distributions."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

from lightning_ae import (
    Autoencoder,
    GatedCode,
    JumpReLUCode,
    KLSparsityCode,
    L1Code,
    LinearDecoder,
    LinearEncoder,
    SoftThresholdCode,
    SparseAutoencoder,
    load,
    soft_threshold,
)
from lightning_ae.codes.ranks import Ranks

CODES = {
    "l1": lambda n: L1Code(0.3),
    "l1_relu": lambda n: L1Code(0.3, "relu"),
    "l1_target": lambda n: L1Code(0.3, "relu", target_l0=2),
    "soft": lambda n: SoftThresholdCode(0.2, 0.4),
    "soft_learned": lambda n: SoftThresholdCode(0.2, 0.4, num_latents=n, target_l0=2),
    "kl": lambda n: KLSparsityCode(0.1, 0.5),
    "jump": lambda n: JumpReLUCode(n, 0.3, init_threshold=0.2),
    "jump_target": lambda n: JumpReLUCode(n, 0.3, target_l0=2, init_threshold=0.2),
    "gated": lambda n: GatedCode(n, 0.3),
    "gated_target": lambda n: GatedCode(n, 0.3, target_l0=2),
}
every_code = pytest.mark.parametrize("make", CODES.values(), ids=CODES)


def test_soft_threshold_minimises_its_objective():
    # (z − c)² + 2t|z| on a fine grid, which holds 0
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    for c in (-3.2, -0.5, -0.1, 0.0, 0.3, 0.5, 2.7):
        for t in (0.0, 0.5, 1.3):
            best = grid[((grid - c).square() + 2 * t * grid.abs()).argmin()]
            found = soft_threshold(torch.tensor(c, dtype=torch.float64), t)
            assert found.item() == pytest.approx(best.item(), abs=1e-3)


def test_soft_threshold_takes_a_threshold_for_each_latent_and_its_gradient_is_minus_the_sign():
    c = torch.tensor([[2.0, -3.0, 0.5], [-2.0, 0.1, 4.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    z = soft_threshold(c, t)
    assert z.tolist() == [[1, -1, 0], [-1, 0, 3]]
    z.sum().backward()
    assert c.grad.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert t.grad.tolist() == [-1 + 1, 1, -1]


def test_a_latent_at_its_threshold_is_off():
    for c in (0.5, -0.5):
        assert soft_threshold(torch.tensor(c), 0.5) == 0
        assert soft_threshold(torch.tensor(c), torch.tensor(0.5)) == 0
    with pytest.raises(ValueError, match="threshold: expected a number >= 0, got -1"):
        soft_threshold(torch.ones(1), -1)


def test_l1_charges_the_sum_of_absolute_values_and_relu_is_exactly_zero():
    h = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    z, penalties = L1Code(0.7)(h)
    assert z is h
    assert penalties["l1"].tolist() == [3.0, 0.5]
    z, penalties = L1Code(0.7, "relu")(h)
    assert z.tolist() == [[1, 0], [0, 0.5]]
    assert penalties["l1"].tolist() == [1.0, 0.5]
    assert L1Code(0.7).weights() == {"l1": 0.7}


def test_maps_are_charged_like_the_flat_latent():
    h = torch.randn(3, 4, 2, 5)
    for code in (L1Code(1.0), L1Code(1.0, "relu"), SoftThresholdCode(0.1, 1.0)):
        torch.testing.assert_close(code(h).penalties["l1"], code(h.flatten(1)).penalties["l1"])


def test_thresholds_and_gates_belong_to_channels():
    h = torch.randn(3, 4, 2, 5)
    for make in (CODES["soft_learned"], CODES["jump"], CODES["gated"]):
        code = make(4)
        with torch.no_grad():
            for parameter in code.parameters():
                parameter.normal_(0, 0.1)
        z, penalties = code(h)
        rows, row_penalties = code(h.movedim(1, -1).reshape(-1, 4))  # each position as an example
        assert torch.equal(z.movedim(1, -1).reshape(-1, 4), rows)
        for name, value in penalties.items():
            torch.testing.assert_close(value, row_penalties[name].view(3, -1).sum(1))


def test_divergence_is_that_of_bernoulli_rates():
    h = torch.randn(50, 7, dtype=torch.float64)
    z, penalties = KLSparsityCode(0.05, 2.0)(h)
    torch.testing.assert_close(z, torch.sigmoid(h))
    expected = kl_divergence(Bernoulli(0.05 * torch.ones(7, dtype=torch.float64)), Bernoulli(z.mean(0))).sum()
    torch.testing.assert_close(penalties["kl_sparsity"], expected.expand(50))
    maps = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    rates = torch.sigmoid(maps).mean((0, 2, 3))
    expected = kl_divergence(Bernoulli(0.05 * torch.ones(3, dtype=torch.float64)), Bernoulli(rates)).sum()
    torch.testing.assert_close(KLSparsityCode(0.05, 2.0)(maps).penalties["kl_sparsity"], expected.expand(5))


def test_a_saturated_unit_is_still_pulled_to_its_rate():
    for value, sign in ((200.0, 1), (-200.0, -1)):
        h = torch.full((4, 1), value, requires_grad=True)
        penalty = KLSparsityCode(0.1, 1.0)(h).penalties["kl_sparsity"].mean()
        penalty.backward()
        assert penalty.isfinite()
        assert (sign * h.grad > 0.01).all()


def test_divergence_is_biased_upwards_in_small_batches_as_documented():
    rate = torch.tensor(0.3).logit()
    h = rate + torch.zeros(4000, 1)
    h = torch.where(torch.rand_like(h) < 0.3, 20.0, -20.0)  # on or off, on in 30 %
    small = torch.stack([KLSparsityCode(0.3, 1.0)(part).penalties["kl_sparsity"].mean() for part in h.split(100)])
    # E KL ≈ variance of the rate over twice ρ(1 − ρ) = 1/2B
    assert small.mean().item() == pytest.approx(1 / 200, rel=0.5)
    assert KLSparsityCode(0.3, 1.0)(h).penalties["kl_sparsity"][0] < 1e-3


def test_sigmoid_units_train_to_the_target_rate():
    torch.manual_seed(0)
    x = torch.rand(512, 16)
    model = SparseAutoencoder(LinearEncoder(16, 12), LinearDecoder(12, 16), KLSparsityCode(0.1, 5.0), lr=0.05)
    optimizer = model.configure_optimizers()
    for _ in range(150):
        optimizer.zero_grad()
        model.training_step(x, 0)["loss"].backward()
        optimizer.step()
    rates = model.encode(x).mean(0)
    assert (rates - 0.1).abs().max() < 0.03


@every_code
def test_encode_equals_forward_and_changes_nothing(make):
    code = make(6).train()
    h = torch.randn(5, 6)
    before = {name: value.clone() for name, value in code.state_dict().items() if isinstance(value, torch.Tensor)}
    z = code.encode(h)
    assert torch.equal(z, code.encode(h))
    assert all(torch.equal(value, before[name]) for name, value in code.state_dict().items() if name in before)
    assert torch.equal(z, code(h).z)


@every_code
def test_forward_changes_no_state_in_evaluation(make):
    code = make(6).eval()
    before = {name: value.clone() for name, value in code.state_dict().items() if isinstance(value, torch.Tensor)}
    code(torch.randn(5, 6))
    code(torch.randn(5, 6))
    assert all(torch.equal(value, before[name]) for name, value in code.state_dict().items() if name in before)


def _model(make, n=6, d=8, **options):
    return Autoencoder(LinearEncoder(d, n), LinearDecoder(n, d), code=make(n), **options)


@every_code
def test_empty_batches_and_all_zero_codes_are_harmless(make):
    model = _model(make).train()
    with torch.no_grad():
        model.encoder.bias.fill_(-0.1)
    terms = model.terms(torch.zeros(0, 8), model(torch.zeros(0, 8)))
    assert all(term.shape == (0,) for term in terms.values())
    x = torch.zeros(3, 8)  # h = −0.1: off everywhere, but for the sigmoid and the identity
    for _ in range(3):
        loss = model.training_step(x, 0)["loss"]
        assert loss.isfinite()
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(float(weight) < 100 for weight in model.code.weights().values())


@every_code
def test_autocast_charges_in_single_precision_and_agrees(make):
    torch.manual_seed(1)
    model = _model(make, n=40, d=8).eval()
    x = torch.randn(16, 8)
    exact = model.terms(x, model(x))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        rounded = model.terms(x, output)
    for name in exact:
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], exact[name], rtol=0.05, atol=0.6 if name == "l0" else 0.1)


@every_code
def test_a_step_compiles_without_a_graph_break(make):
    torch._dynamo.reset()
    torch.manual_seed(2)
    model, plain = _model(make).train(), _model(make).train()
    plain.load_state_dict(model.state_dict())

    def loss(model, x):
        return model.objective(model.terms(x, model(x))).mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(5, 8)
        model.code.after_step(Ranks())
        ours, theirs = compiled(model, x), loss(plain, x)
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        theirs.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in plain.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(model.state_dict()[name], value)


@every_code
def test_checkpoints_rebuild_code_and_state(make, make_trainer, tmp_path):
    x = torch.randn(32, 8)
    model = _model(make)
    trainer = make_trainer(max_epochs=3)
    trainer.fit(model, torch.utils.data.DataLoader(x, batch_size=8))
    if getattr(model.code, "controller", None) is None:
        model.code.weight = 0.123  # as a schedule would
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = load(tmp_path / "model.ckpt").eval()
    model.eval()
    assert type(again.code) is type(model.code)
    assert {name: float(w) for name, w in again.code.weights().items()} == {
        name: float(w) for name, w in model.code.weights().items()
    }
    assert torch.equal(again.encode(x), model.encode(x))
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(again.state_dict()[name], value)


@every_code
def test_codes_work_on_maps_in_a_convolutional_autoencoder(make):
    encoder, decoder = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
    model = Autoencoder(encoder, decoder, code=make(6)).train()
    x = torch.rand(4, 1, 8, 8)
    output = model(x)
    assert output.z.shape == (4, 6, 8, 8)
    assert all(value.shape == (4,) for value in output.penalties.values())
    model.training_step(x, 0)["loss"].backward()
    assert encoder.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1Code(-1.0), "weight: expected a finite number >= 0, got -1"),
        (lambda: L1Code(float("nan")), "weight"),
        (lambda: L1Code(1.0, "tanh"), "activation: expected 'identity' or 'relu', got 'tanh'"),
        (lambda: L1Code(1.0, target_l0=3), "target_l0: with the identity no latent is zero"),
        (lambda: L1Code(1.0, "relu", target_l0=0), "target_l0: expected a positive"),
        (lambda: L1Code(0.0, "relu", target_l0=3), "weight: expected a positive number to start from"),
        (lambda: SoftThresholdCode(-0.1), "threshold"),
        (lambda: SoftThresholdCode(0.0, num_latents=3), "threshold: expected a positive number for thresholds that"),
        (lambda: KLSparsityCode(1.0, 1.0), r"target: expected a number in \(0, 1\), got 1"),
        (lambda: JumpReLUCode(0, 1.0), "num_latents"),
        (lambda: JumpReLUCode(3, 1.0, init_threshold=0.0), "init_threshold"),
        (lambda: JumpReLUCode(3, 1.0, bandwidth=2.0), "bandwidth"),
        (lambda: GatedCode(0, 1.0), "num_latents"),
        (lambda: JumpReLUCode(3, 1.0)(torch.ones(2, 4)), r"expected h to be \(B, 3, ...\), got \(2, 4\)"),
        (lambda: GatedCode(3, 1.0)(torch.ones(2, 4)), "num_latents"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
