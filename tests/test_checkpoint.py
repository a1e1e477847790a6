"""Checkpoints rebuild models by themselves, run no code, and say what is wrong with a bad one."""

from __future__ import annotations

import pickle
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_ae as ae
from lightning_ae.rebuildable import describe, rebuild


def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


class Smooth(ae.Autoencoder):
    """A user's subclass with arguments of its own."""

    def __init__(self, width: int, rate: float = 0.5):
        super().__init__(*ae.mlp_pair(6, 2, hidden=(width,)), ae.GaussianNLL(learn_scale=True), lr=rate)


def _linear(**kwargs):
    encoder = ae.LinearEncoder(6, 2)
    return ae.Autoencoder(encoder, ae.LinearDecoder(2, 6, tied_to=encoder), **kwargs)


MODELS = {
    "linear": lambda: ae.LinearAutoencoder(6, 2, tied=False),
    "tied": lambda: ae.LinearAutoencoder(6, 2),
    "tied by hand": _linear,
    "mlp": lambda: ae.MLPAutoencoder((2, 3), 2, hidden=[5, 4], activation="tanh", norm="batch", tied=True),
    "conv": lambda: ae.ConvAutoencoder((1, 5, 7), 2, channels=(3,), loss=ae.BernoulliNLL()),
    "denoising": lambda: ae.DenoisingAutoencoder(6, 2, corruption=ae.SaltAndPepper(0.1, high=2.0)),
    "contractive": lambda: ae.ContractiveAutoencoder(6, 2, penalties={"prior": ae.WeightPrior(num_examples=9)}),
    "counts": lambda: ae.MLPAutoencoder(6, 2, loss=ae.ZeroInflatedNegativeBinomialNLL(6, library_size=True)),
    "physics": lambda: ae.LinearAutoencoder(
        6, 2, penalties={"mass": ae.ConstraintPenalty(ae.Total(), conserve=True), "q": ae.OrthogonalityPenalty(0.1)}
    ),
    "subclass": lambda: Smooth(3, rate=0.1),
}


def save(model: L.LightningModule, path) -> str:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False)  # fmt: skip
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_rebuilt_with_its_class_arguments_and_weights(name, tmp_path):
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    trusted = [__name__] if name == "subclass" else []
    again = ae.load(save(model, tmp_path / "m.ckpt"), trusted=trusted)
    assert type(again) is type(model)
    assert dict(again.hparams) == dict(model.hparams)
    assert again.lr == model.lr
    for (key, value), (other_key, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    x = torch.rand(3, *((1, 5, 7) if name == "conv" else (2, 3) if name == "mlp" else (6,)))
    assert torch.equal(model.eval().reconstruct(x), again.eval().reconstruct(x))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda number: ae.VariationalAutoencoder(*ae.mlp_pair(6, 2, h_dim=4), code=ae.GaussianCode(number)),
        lambda number: ae.VectorQuantizedAutoencoder(
            *ae.mlp_pair(6, 2), code=ae.VectorQuantizerCode(4, 2, commitment=number)
        ),
        lambda number: ae.MLPAutoencoder(6, 2, penalties={"prior": ae.WeightPrior(number)}),
        lambda number: ae.MLPAutoencoder(6, 2, loss=ae.AlphaMix(ae.SquaredError(), ae.GaussianNLL(), number)),
        lambda number: ae.MLPAutoencoder(6, 2, lr=number, weight_decay=number),
    ],
)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numbers_of_numpy_are_saved_as_plain_ones(build, kind, tmp_path, make_trainer):
    model = build(kind(0.25))
    trainer = make_trainer()
    trainer.fit(model, DataLoader(torch.rand(16, 6), batch_size=8))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = ae.load(tmp_path / "m.ckpt")
    for (key, value), (other_key, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_a_tied_weight_is_still_one_parameter(tmp_path):
    again = ae.load(save(_linear(), tmp_path / "m.ckpt"))
    assert again.decoder.layer.weight is again.encoder.weight


def test_load_from_checkpoint_gives_the_class_it_is_called_on(tmp_path):
    path = save(Smooth(3), tmp_path / "m.ckpt")
    assert type(Smooth.load_from_checkpoint(path)) is Smooth
    assert Smooth.load_from_checkpoint(path, rate=0.25).lr == 0.25


def test_a_base_class_loads_its_subclasses(tmp_path):
    path = save(ae.DenoisingAutoencoder(6, 2), tmp_path / "m.ckpt")
    assert type(ae.MLPAutoencoder.load_from_checkpoint(path)) is ae.DenoisingAutoencoder


def test_loading_into_the_wrong_class_is_an_error(tmp_path):
    path = save(ae.LinearAutoencoder(6, 2), tmp_path / "m.ckpt")
    with pytest.raises(TypeError, match=r"holds a lightning_ae.LinearAutoencoder, not a lightning_ae.MLPAutoencoder"):
        ae.MLPAutoencoder.load_from_checkpoint(path)


def test_a_users_class_needs_trust(tmp_path):
    path = save(Smooth(3), tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"asks for .*Smooth, which is not part of lightning_ae.*trusted="):
        ae.load(path)


def test_a_users_module_is_passed_again_and_the_message_says_which(tmp_path):
    model = ae.Autoencoder(
        nn.Linear(6, 2), ae.LinearDecoder(2, 6), penalties={"law": ae.ConstraintPenalty(halve, weight=2.0)}
    )
    path = save(model, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"encoder \(a torch.*Linear\), penalties.law.residual \(a halve\)"):
        ae.load(path)
    again = ae.load(path, encoder=nn.Linear(6, 2), **{"penalties.law.residual": halve})
    x = torch.rand(2, 6)
    assert torch.equal(again.reconstruct(x), model.reconstruct(x))
    assert again.penalties["law"].weight == 2.0


def test_a_name_that_the_model_does_not_have_is_an_error(tmp_path):
    path = save(_linear(), tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"no part at \['penalties.nothing'\]"):
        ae.load(path, **{"penalties.nothing": 1})


def test_a_checkpoint_may_not_name_any_callable():
    for path in ("os.system", "lightning_ae.models.loading.load", "lightning_ae.models.base.torch.load"):
        with pytest.raises(ValueError, match="asks for"):
            rebuild({"class_path": path, "init_args": {}})


def test_a_pickle_of_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "evil.ckpt"
    with path.open("wb") as file:
        pickle.dump({"hyper_parameters": Payload(), "state_dict": {}}, file, protocol=2)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        ae.load(path)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error_that_says_so(keep, tmp_path):
    path = tmp_path / "m.ckpt"
    save(_linear(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"m.ckpt is not a readable checkpoint \(cut short"):
        ae.load(path)


def test_attributes_that_changed_in_training_are_kept(tmp_path):
    mix = ae.AlphaMix(ae.SquaredError(), ae.LaplaceNLL(), 0.5)
    sums = ae.WeightedLoss({"mix": mix, "l": ae.LaplaceNLL()})
    model = ae.MLPAutoencoder(6, 2, loss=sums, penalties={"q": ae.OrthogonalityPenalty(1.0)})
    mix.alpha, sums.weights["l"], model.penalties["q"].weight = 0.25, 3.0, 0.125
    again = ae.load(save(model, tmp_path / "m.ckpt"))
    assert again.loss.losses["mix"].alpha == 0.25
    assert again.loss.weights == {"mix": 1.0, "l": 3.0}
    assert again.penalties["q"].weight == 0.125


def test_what_is_kept_belongs_to_one_model_and_one_state():
    def build():
        scales = ae.BlockMean(2)
        decoders = ae.scale_decoders(scales, (1, 4), 2, hidden=())
        loss = ae.WeightedLoss({"l": ae.LaplaceNLL()})
        return ae.MultiScaleAutoencoder(ae.MLPEncoder((1, 4), 2), decoders, scales, loss, level_weights=[0.5, 1.0])

    model, other = build(), build()
    state = model.state_dict()
    other.load_state_dict(state)
    model.level_weights[0], model.loss.weights["l"] = 9.0, 9.0  # as a schedule does
    assert (other.level_weights, other.loss.weights) == ([0.5, 1.0], {"l": 1.0})
    model.load_state_dict(state)
    assert (model.level_weights, model.loss.weights) == ([0.5, 1.0], {"l": 1.0})


def test_defaults_are_recorded_so_that_they_may_change(tmp_path):
    assert Smooth(3).hparams["init_args"] == {"width": 3, "rate": 0.5}


def test_numpys_numbers_and_arrays_are_arguments_like_others(tmp_path):
    class WithArray(ae.Autoencoder):
        def __init__(self, scale, rate):
            super().__init__(*ae.mlp_pair(6, 2), lr=rate)

    model = WithArray(np.arange(3.0), np.float64(0.25))
    again = WithArray.load_from_checkpoint(save(model, tmp_path / "m.ckpt"))
    assert again.lr == 0.25
    assert again.hparams["init_args"]["scale"].tolist() == [0.0, 1.0, 2.0]


def test_a_renamed_class_is_named_again(tmp_path):
    class Renamed(Smooth):
        pass

    path = save(Smooth(3), tmp_path / "m.ckpt")
    with pytest.raises(TypeError, match=r"holds a .*Smooth, not a .*Renamed.*load\(path, cls=Renamed\)"):
        Renamed.load_from_checkpoint(path)
    assert type(ae.load(path, cls=Renamed)) is Renamed


def test_loading_leaves_the_random_numbers_of_the_next_fit_alone(make_trainer, tmp_path):
    data = ae.TensorDataModule(torch.rand(16, 6), batch_size=8, val_fraction=0.0)
    first = make_trainer()
    first.fit(ae.DenoisingAutoencoder(6, 2), data)
    first.save_checkpoint(tmp_path / "m.ckpt")
    ends = []
    for seed in (1, 2):
        model = ae.load(tmp_path / "m.ckpt")
        make_trainer().test(model, torch.utils.data.DataLoader(torch.rand(8, 6)), tmp_path / "m.ckpt", verbose=False)
        L.seed_everything(seed, verbose=False)
        make_trainer().fit(model, data)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(*ends)


def test_a_missing_file_and_a_foreign_checkpoint_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        ae.load(tmp_path / "nowhere.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of a lightning_ae model"):
        ae.load(tmp_path / "other.ckpt")


def test_describe_keeps_data_only():

    class Part(ae.Rebuildable):
        def __init__(self, *args, **kwargs):
            pass

    assert describe(Part(a=(1, 2), b=torch.ones(1)))["init_args"]["a"] == (1, 2)
    assert "not_recorded" in describe(Part(1))


def test_a_checkpoint_of_a_script_loads_in_another_process(tmp_path):
    """Classes of ``__main__`` have another path when they are imported: naming the class is enough."""
    script = tmp_path / "project.py"
    script.write_text(
        "import sys, lightning as L, lightning_ae as ae\n"
        "class Mine(ae.Autoencoder):\n"
        "    def __init__(self, width=3):\n"
        "        super().__init__(*ae.mlp_pair(6, 2, hidden=(width,)))\n"
        "if __name__ == '__main__':\n"
        "    t = L.Trainer(accelerator='cpu', logger=False, enable_checkpointing=False)\n"
        "    t.strategy.connect(Mine(4)); t.save_checkpoint(sys.argv[1])\n"
    )
    path = tmp_path / "m.ckpt"
    subprocess.run([sys.executable, script, path], check=True, capture_output=True)
    load = f"import project; print(project.Mine.load_from_checkpoint({str(path)!r}).encoder.linears()[0].out_features)"
    done = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "4"


def test_weights_in_double_precision_stay_what_they_are(make_trainer, tmp_path):
    model = ae.MLPAutoencoder(8, 2, hidden=(4,), norm="batch")
    trainer = make_trainer(precision="64-true")
    trainer.fit(model, DataLoader(torch.randn(16, 8, dtype=torch.float64), batch_size=8))
    trainer.save_checkpoint(tmp_path / "double.ckpt")
    loaded = ae.load(tmp_path / "double.ckpt")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(loaded.eval().reconstruct(x), model.eval().reconstruct(x))


@pytest.mark.parametrize("part", ["encoder", "decoder", "encoder.layers"])
@torch.no_grad()
def test_a_model_with_one_part_compiled_loads_and_so_does_it_from_a_plain_file(part, make_trainer, tmp_path):
    def model(compiled: bool):
        torch.manual_seed(int(compiled))
        made = ae.MLPAutoencoder(6, 2, hidden=(4,))
        if compiled:
            owner, _, name = part.rpartition(".")
            owner = made.get_submodule(owner)
            setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))
        return made

    x = torch.rand(3, 6)
    for compiled in (True, False):
        saved, path = model(compiled), tmp_path / f"{compiled}.ckpt"
        trainer = make_trainer()
        trainer.strategy.connect(saved)
        trainer.save_checkpoint(path)
        assert any("_orig_mod" in name for name in torch.load(path)["state_dict"]) == compiled
        for loaded in (ae.load(path), ae.MLPAutoencoder.load_from_checkpoint(path)):
            torch.testing.assert_close(loaded.reconstruct(x), saved.reconstruct(x))
        # into a model that is there, as a Trainer does, compiled or not
        for other in (model(not compiled), model(compiled)):
            torch.manual_seed(7)
            for parameter in other.parameters():
                torch.nn.init.normal_(parameter)
            make_trainer().validate(other, ae.TensorDataModule(x), ckpt_path=path, verbose=False)
            torch.testing.assert_close(other.reconstruct(x), saved.reconstruct(x))


def test_a_compiled_part_that_is_passed_again_takes_the_weights(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.strategy.connect(saved := ae.Autoencoder(torch.nn.Linear(6, 2), torch.nn.Linear(2, 6)))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    encoder = torch.compile(torch.nn.Linear(6, 2), backend="eager")
    loaded = ae.load(tmp_path / "m.ckpt", encoder=encoder, decoder=torch.nn.Linear(2, 6))
    x = torch.rand(3, 6)
    torch.testing.assert_close(loaded.reconstruct(x), saved.reconstruct(x))


class Quiet(ae.Autoencoder):
    """Its own number is an argument and an attribute."""

    def __init__(self, quiet: float = 0.1):
        super().__init__(ae.LinearEncoder(6, 2), ae.LinearDecoder(2, 6))
        self.quiet = 2 * quiet  # not what it was given


@pytest.mark.parametrize(
    ("model", "path", "name", "value"),
    [
        (lambda: ae.MLPAutoencoder(6, 2), "", "lr", 5e-4),
        (lambda: ae.MLPAutoencoder(6, 2), "", "weight_decay", 0.25),
        (
            lambda: ae.MLPAutoencoder(6, 2, penalties={"p": ae.WeightPrior(num_examples=9)}),
            "penalties.p",
            "weight",
            3.0,
        ),
        (lambda: ae.ContractiveAutoencoder(6, 2), "penalties.contractive", "weight", 0.5),
        (lambda: ae.VariationalAutoencoder(*ae.mlp_pair(6, 2, h_dim=4)), "code", "beta", 0.25),
        (lambda: ae.SparseAutoencoder(*ae.mlp_pair(6, 2), code=ae.L1Code(0.1)), "code", "weight", 0.7),
        (lambda: ae.DenoisingAutoencoder(6, 2, corruption=ae.GaussianNoise(0.1)), "corruption", "std", 0.3),
        (lambda: ae.MLPAutoencoder(6, 2), "", "lr", np.float64(5e-4)),
        (lambda: ae.MLPAutoencoder(6, 2), "", "lr", np.float32(0.25)),
        (lambda: ae.MLPAutoencoder(6, 2), "", "weight_decay", torch.tensor(0.25)),
        (lambda: ae.DenoisingAutoencoder(6, 2, corruption=ae.GaussianNoise(0.1)), "corruption", "std", np.float64(0.3)),
        (
            lambda: ae.MLPAutoencoder(6, 2, penalties={"p": ae.JacobianPenalty(0.1)}),
            "penalties.p",
            "num_projections",
            2,
        ),
        (
            lambda: ae.MLPAutoencoder(6, 2, penalties={"p": ae.JacobianPenalty(0.1, 2)}),
            "penalties.p",
            "num_projections",
            None,
        ),
        (lambda: Quiet(0.1), "", "quiet", 0.7),
        (lambda: Smooth(3), "", "lr", 0.01),
    ],
)
def test_what_was_set_after_construction_comes_back(model, path, name, value, tmp_path):
    made = model()
    assert getattr(made.get_submodule(path), name) != value
    setattr(made.get_submodule(path), name, value)
    again = ae.load(save(made, tmp_path / "m.ckpt"), trusted=[__name__])
    assert getattr(again.get_submodule(path), name) == value
    # and a second time
    assert getattr(ae.load(save(again, tmp_path / "n.ckpt"), trusted=[__name__]).get_submodule(path), name) == value


def test_an_argument_that_is_passed_again_wins_over_what_was_set(tmp_path):
    model = ae.MLPAutoencoder(6, 2, lr=0.1)
    model.lr, model.weight_decay = 0.2, 0.3
    again = ae.load(save(model, tmp_path / "m.ckpt"), lr=0.5)
    assert (again.lr, again.weight_decay) == (0.5, 0.3)


def test_settings_in_a_file_are_numbers_of_known_names_and_nothing_else(tmp_path):
    path = save(ae.MLPAutoencoder(6, 2), tmp_path / "m.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["settings"] = {
        "": {"lr": "fast", "training": False, "weight_decay": True, "forward": 1.0}, "encoder": 3, "nobody": {"a": 1.0}
    }  # fmt: skip
    torch.save(checkpoint, path)
    again = ae.load(path)
    assert (again.lr, again.weight_decay, again.training) == (1e-3, 0.0, True)
    assert callable(again.forward)


def test_loggers_get_arguments_with_their_defaults_on_one_level(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    model = ae.ConvAutoencoder((1, 8, 8), 3, channels=(4,), loss=ae.GaussianNLL(0.5), code=ae.L1Code(0.1))
    model.lr = 0.02
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=logger, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1)  # fmt: skip
    trainer.fit(model, DataLoader(torch.rand(8, 1, 8, 8), 4))
    logged = logger.experiment.hparams
    expected = {"model": "ConvAutoencoder", "latent_dim": 3, "lr": 0.02, "weight_decay": 0.0, "norm": None}
    expected |= {"loss": "GaussianNLL", "loss.scale": 0.5, "loss.learn_scale": False, "code": "L1Code"}
    expected["code.weight"] = 0.1
    assert {name: logged.get(name) for name in expected} == expected
    assert not any(isinstance(value, (dict, list, tuple)) for value in logged.values())


def test_frozen_parameters_get_a_group_of_their_own_from_basefinetuning():
    from lightning.pytorch.callbacks import BaseFinetuning

    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.encoder)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=1e-5)

    model = ae.MLPAutoencoder(6, 2, hidden=(4,), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = []
    watch = L.pytorch.callbacks.LambdaCallback(
        on_train_epoch_end=lambda *_: moved.append({n for n, p in model.named_parameters() if not p.equal(before[n])})
    )
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, callbacks=[Thaw(), watch])  # fmt: skip
    trainer.fit(model, DataLoader(torch.rand(16, 6), 4))
    assert moved[0] == {name for name in before if name.startswith("decoder")}
    assert moved[1] == set(before)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2, 1e-5]


def test_a_model_of_frozen_parameters_is_refused():
    with pytest.raises(ValueError, match="all parameters are frozen"):
        ae.MLPAutoencoder(6, 2).requires_grad_(False).configure_optimizers()
