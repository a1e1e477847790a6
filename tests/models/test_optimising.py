"""What decays with weight decay, and what does not."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import lightning_ae as ae


def jump(cls=ae.SparseAutoencoder, **kwargs):
    return cls(*ae.mlp_pair(6, 4, (5,)), code=ae.JumpReLUCode(4, 0.1), loss=ae.GaussianNLL(learn_scale=True), **kwargs)


KINDS = {
    "jump": (lambda **k: jump(**k), {"code.log_scale", "loss.log_scale"}),
    "gated": (
        lambda **k: ae.SparseAutoencoder(*ae.mlp_pair(6, 4, (5,)), code=ae.GatedCode(4, 0.1), **k),
        {"code.log_gain", "code.bias"},
    ),
    "soft threshold": (
        lambda **k: ae.SparseAutoencoder(*ae.mlp_pair(6, 4, (5,)), code=ae.SoftThresholdCode(0.1, num_latents=4), **k),
        {"code.log_scale"},
    ),
    "counts": (
        lambda **k: ae.MLPAutoencoder(6, 2, loss=ae.NegativeBinomialNLL(6), **k),
        {"loss.log_inverse_dispersion"},
    ),
    "dictionary": (
        lambda **k: ae.DictionaryAutoencoder(6, 12, ae.JumpReLUCode(12, 0.1), **k),
        {"pre_bias", "code.log_scale"},
    ),
    "plain": (lambda **k: ae.MLPAutoencoder(6, 2, **k), set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_gains_and_scales_do_not_decay(kind):
    build, still = KINDS[kind]
    model = build(weight_decay=0.1)
    optimizer = model.configure_optimizers()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decays[id(p)] == 0} == still
    assert len(decays) == len(list(model.parameters()))
    # the encoder of a dictionary has a rate of its own, and so have scales of losses
    alone = kind == "dictionary" or any(name.startswith("loss.") for name in still)
    assert len(build().configure_optimizers().param_groups) == (2 if alone else 1)


def test_scales_of_likelihoods_learn_ten_times_as_fast():
    losses = {"gaussian": ae.GaussianNLL(learn_scale=True), "laplace": ae.LaplaceNLL(learn_scale=True)}
    inner = ae.MLPAutoencoder(3, 2, hidden=(4,), loss=ae.GaussianNLL(learn_scale=True))
    outer = ae.MLPAutoencoder(6, 3, hidden=(4,), loss=ae.WeightedLoss(losses))
    for model, number in ((outer, 2), (ae.StackedAutoencoder([outer, inner]), 3)):
        model.lr = 0.0015
        rates = {id(p): g["lr"] for g in model.configure_optimizers().param_groups for p in g["params"]}
        fast = {name for name, p in model.named_parameters() if rates[id(p)] == pytest.approx(0.015)}
        assert len(fast) == number
        assert all(name.endswith("log_scale") for name in fast)
        assert {rates[id(p)] for name, p in model.named_parameters() if name not in fast} == {0.0015}
        for lr, scales in ((0.01, 0.02), (0.1, 0.1)):  # a logarithm that moves by more would swing
            model.lr = lr
            assert {group["lr"] for group in model.configure_optimizers().param_groups} == {lr, scales}


def test_without_a_gradient_a_threshold_stays_where_it_is():
    model = jump(weight_decay=0.5, lr=0.1)
    model.code.log_scale.data.fill_(2.0)
    model.loss.log_scale.data.fill_(-3.0)
    before = model.encoder.linears()[0].weight.detach().clone()
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (model.code.log_scale == 2).all()
    assert model.loss.log_scale == -3
    torch.testing.assert_close(model.encoder.linears()[0].weight, 0.95 * before)


class _Before(ae.SparseAutoencoder):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class _BeforeDictionary(ae.DictionaryAutoencoder):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class _BiasApart(ae.DictionaryAutoencoder):
    def configure_optimizers(self):
        others = [p for p in self.parameters() if p is not self.pre_bias]
        groups = [{"params": [self.pre_bias], "weight_decay": 0.0}, {"params": others}]
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)


def dictionary(cls, **kwargs):
    return cls(6, 12, ae.JumpReLUCode(12, 0.1), **kwargs)


@pytest.mark.parametrize(
    ("build", "before", "now"),
    [
        (jump, _Before, ae.SparseAutoencoder),
        (jump, ae.SparseAutoencoder, ae.SparseAutoencoder),
        (dictionary, _BeforeDictionary, ae.DictionaryAutoencoder),
        (dictionary, _BiasApart, ae.DictionaryAutoencoder),
        (dictionary, ae.DictionaryAutoencoder, ae.DictionaryAutoencoder),
        (dictionary, _BiasApart, _BiasApart),  # as a subclass of the user's resumes with its own optimizer
    ],
)
def test_a_checkpoint_in_which_more_decayed_is_resumed(build, before, now, make_trainer, tmp_path):
    data = ae.TensorDataModule(torch.randn(64, 6) + 5, batch_size=16, val_fraction=0.0)
    L.seed_everything(1, verbose=False)
    first = build(before, weight_decay=0.1)
    trainer = make_trainer()
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    moments = {name: trainer.optimizers[0].state[p]["exp_avg_sq"].clone() for name, p in first.named_parameters()}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            self.moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in pl_module.named_parameters()}

    look = Look()
    again = build(now, weight_decay=0.1)
    resumed = make_trainer(max_epochs=2, callbacks=[look])
    resumed.fit(again, data, ckpt_path=tmp_path / "m.ckpt")
    assert all(torch.equal(look.moments[name], moments[name]) for name in moments)
    (optimizer,) = resumed.optimizers
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(again.encoder.weight if build is dictionary else again.encoder.linears()[0].weight)] == 0.1
    assert decays[id(again.code.log_scale)] == (0.1 if now is _BiasApart else 0.0)
