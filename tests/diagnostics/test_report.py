"""Findings and reports on networks that are broken in a known way, and again when their advice was followed."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.diagnostics.monitors.output import OutputMonitor


def fit(make_trainer, model, data=None, epochs=8, **options):
    report = ae.DiagnosticsReport(every_n_steps=2, quiet=True, **options)
    trainer = make_trainer(max_epochs=epochs, callbacks=report, log_every_n_steps=5, limit_val_batches=0)
    trainer.fit(model, data if data is not None else ae.DigitsDataModule())
    return report


def measures(report, severity=None):
    return {finding.measure for finding in report.findings if severity in (None, finding.severity)}


def causes(report):
    """Names of the causes that were found, and of what was seen as well."""
    return {f.cause for f in report.findings} | {
        symptom.rpartition("(")[2][:-1] for f in report.findings for symptom in f.symptoms
    }


def bytes_of_digits():
    digits = ae.DigitsDataModule()
    digits.prepare_data()
    digits.setup("fit")
    return torch.cat([x for x, _ in digits.train_dataloader()]) * 255


def mlp(**options):
    return ae.MLPAutoencoder((1, 8, 8), 8, hidden=(64,), activation="relu", **options)


class TestFindings:
    def test_a_healthy_network_has_none_that_is_serious(self, make_trainer):
        report = fit(make_trainer, ae.ConvAutoencoder((1, 8, 8), 8, loss=ae.BernoulliNLL()))
        assert [finding for finding in report.findings if finding.severity != "info"] == []

    def test_squared_error_through_a_sigmoid_on_unscaled_data_and_what_following_the_advice_does(self, make_trainer):
        x = bytes_of_digits()
        report = fit(make_trainer, mlp(loss=ae.SquaredError("sigmoid")), ae.TensorDataModule(x, batch_size=64))
        assert measures(report, "error") >= {"outside", "starved_fraction"}
        assert "constant_output" in causes(report)
        by_measure = {finding.measure: finding for finding in report.findings}
        assert "divide images by 255" in by_measure["outside"].advice
        assert "BernoulliNLL()" in by_measure["starved_fraction"].advice
        assert by_measure["outside"].value == pytest.approx(float((x > 1).double().mean()), abs=0.02)

        mended = fit(make_trainer, mlp(loss=ae.BernoulliNLL()), ae.TensorDataModule(x / 255, batch_size=64), epochs=12)
        assert measures(mended, "error") == set()

    def test_most_relus_dead_and_what_following_the_advice_does(self, make_trainer):
        model = mlp()
        with torch.no_grad():
            model.encoder.layers[0].bias[:60] = -100.0  # with fewer it learns all the same
        report = fit(make_trainer, model)
        (finding,) = [f for f in report.findings if f.measure == "dead_fraction" and f.site == "encoder.layers.1"]
        assert finding.severity == "error"
        assert finding.value == pytest.approx(60 / 64, abs=0.05)
        assert finding.n > 1000
        assert f"rate < {3 / finding.n:.1g}" in finding.evidence
        mended = fit(make_trainer, mlp())  # biases as they are drawn
        assert "dead_fraction" not in measures(mended, "error")

    def test_stacked_sigmoids_with_the_layer_to_mend_first(self, make_trainer):
        model = ae.MLPAutoencoder((1, 8, 8), 8, hidden=(64,) * 4, activation="sigmoid", loss=ae.BernoulliNLL())
        report = fit(make_trainer, model)
        (finding,) = [f for f in report.findings if f.measure == "transmission"]
        transmissions = {site: row["transmission"] for site, row in report.report.sites.items()}
        assert finding.site == min(transmissions, key=transmissions.get)
        assert "constant_output" in causes(report)
        model = ae.MLPAutoencoder((1, 8, 8), 8, hidden=(64,) * 4, activation="gelu", loss=ae.BernoulliNLL(), lr=3e-3)
        assert "transmission" not in measures(fit(make_trainer, model))

    def test_pixels_that_are_black_for_ever(self, make_trainer):
        model = mlp(loss=ae.SquaredError("relu"))
        with torch.no_grad():
            model.decoder.layers[-1].bias[20:30] = -5.0
        report = fit(make_trainer, model)
        (finding,) = [f for f in report.findings if f.measure == "stuck_outputs"]
        assert finding.value >= 9  # pixel 24 hardly ever has ink

    @pytest.mark.parametrize("start", [-12.0, 12.0])
    def test_all_black_and_all_white(self, make_trainer, start):
        model = mlp(loss=ae.SquaredError("sigmoid"))
        with torch.no_grad():
            model.decoder.layers[-1].weight.mul_(1e-3)
            model.decoder.layers[-1].bias.fill_(start)
        report = fit(make_trainer, model, epochs=2)
        finding = report.findings[0]
        assert finding.cause == "squared_error_sigmoid"
        (symptom,) = [s for s in finding.symptoms if "constant_output" in s]
        assert ("all black" if start < 0 else "all white") in symptom

    def test_a_loss_that_explodes(self, make_trainer):
        report = fit(make_trainer, mlp(lr=3.0))
        assert "exploded" in measures(report, "error")
        assert "exploded" not in measures(fit(make_trainer, mlp(lr=1e-3)))

    def test_a_loss_that_is_not_finite(self, make_trainer):
        class Broken(ae.MLPAutoencoder):
            def objective(self, terms):
                return super().objective(terms) * (float("nan") if self.global_step > 20 else 1.0)

        with pytest.warns(UserWarning, match="is not finite"):
            report = fit(make_trainer, Broken((1, 8, 8), 4), epochs=3)
        assert "exploded" in measures(report, "error")

    def test_an_activation_applied_twice(self, make_trainer):
        decoder = nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        with pytest.warns(UserWarning, match="once more"):
            model = ae.Autoencoder(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), decoder, ae.SquaredError("sigmoid"))
        report = fit(make_trainer, model, epochs=2)
        (finding,) = [f for f in report.findings if f.measure == "twice"]
        assert finding.site == "loss.sigmoid"
        assert "Remove decoder.1" in finding.advice

    def test_logits_that_are_none(self):
        network = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        x = torch.rand(128, 4)
        report = ae.diagnose(network, [x], functional.binary_cross_entropy_with_logits)
        assert next(f.advice for f in report.findings if f.measure == "twice").startswith("That squeezes")
        plain = ae.diagnose(nn.Sequential(nn.Linear(4, 4)), [x], functional.binary_cross_entropy_with_logits)
        assert "twice" not in {f.measure for f in plain.findings}

    def test_latents_that_nobody_reads_or_that_never_vary(self, make_trainer):
        model = ae.MLPAutoencoder((1, 8, 8), 8, hidden=(32,), activation="gelu", lr=0.0)
        with torch.no_grad():
            model.decoder.layers[0].weight[:, :2] = 0.0  # not read
            model.encoder.layers[-1].weight[5:] = 0.0  # do not vary
        report = fit(make_trainer, model, epochs=2)
        assert next(f.value for f in report.findings if f.measure == "unread") == 2 / 8
        assert "3 of 8 latents never vary" in " ".join(str(report.report).split())

    def test_a_penalty_that_leaves_no_code_and_one_that_does_nothing(self, make_trainer):
        class CodeSize(ae.Penalty):
            def forward(self, x, output, model):
                return output.z.square().flatten(1).sum(1)

        strong = mlp(penalties={"size": CodeSize(1e6)}, lr=1e-2)
        with torch.no_grad():
            for parameter in strong.encoder.layers[-1].parameters():
                parameter.zero_()
        finding = next(f for f in fit(make_trainer, strong, epochs=2).findings if f.measure == "zero_code")
        assert "'size'" in finding.advice
        weak = fit(make_trainer, mlp(penalties={"size": CodeSize(1e-12)}))
        assert "penalty size" in measures(weak, "info")
        fine = fit(make_trainer, mlp(penalties={"size": CodeSize(1e-3)}))
        assert not measures(fine) & {"zero_code", "penalty size"}

    def test_a_collapsed_posterior_and_what_following_the_advice_does(self, make_trainer):
        class VAE(L.LightningModule):
            def __init__(self, beta):
                super().__init__()
                self.beta = beta
                self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU())
                self.mean, self.log_variance = nn.Linear(32, 4), nn.Linear(32, 4)
                self.decoder = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 64))

            def training_step(self, batch, batch_idx):
                x = batch[0].flatten(1)
                h = self.body(batch[0])
                mean, log_variance = self.mean(h), self.log_variance(h)
                z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
                nll = functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") / len(x)
                kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
                return nll + self.beta * kl

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 1e-2)

        latent = {"mean": "mean", "log_variance": "log_variance"}
        with pytest.warns(UserWarning, match="no `validation_step`"):
            collapsed = fit(make_trainer, VAE(beta=100.0), latent=latent, epochs=25)
        assert "collapsed" in measures(collapsed)
        assert collapsed.report.latent["kl"] < 0.1
        with pytest.warns(UserWarning, match="no `validation_step`"):
            mended = fit(make_trainer, VAE(beta=0.1), latent=latent, epochs=25)
        assert "collapsed" not in measures(mended)
        assert mended.report.latent["kl"] > 1

    @pytest.mark.parametrize(("beta", "epochs"), [(50.0, 15), (4.0, 40)])
    def test_a_collapsed_vae_of_ours_is_seen_in_a_short_run_with_few_looks(self, make_trainer, beta, epochs):
        pair = ae.mlp_pair((1, 8, 8), 8, h_dim=16)
        model = ae.VariationalAutoencoder(*pair, ae.BernoulliNLL(), code=ae.GaussianCode(beta))
        report = ae.DiagnosticsReport(quiet=True)  # at every 25th step: a dozen looks, from the first step on
        trainer = make_trainer(max_epochs=epochs, callbacks=report)
        trainer.fit(model, ae.DigitsDataModule())
        assert float(trainer.callback_metrics["val/kl"]) < 0.1
        first, *others = report.findings
        assert (first.severity, first.measure) == ("error", "collapsed")
        assert all("collapsed" in finding.advice for finding in others if finding.severity != "info")
        assert report.report.latent["kl"] == pytest.approx(float(trainer.callback_metrics["val/kl"]), abs=0.02)
        assert report.report.latent["active_units"] <= 1


class TestReport:
    def test_reads_monitors_that_are_there_and_brings_the_others(self, make_trainer):
        mine = ae.DeadReLUMonitor(every_n_steps=1)
        report = ae.DiagnosticsReport(every_n_steps=4, quiet=True)
        trainer = make_trainer(callbacks=[report, mine], max_epochs=2)
        trainer.fit(mlp(), ae.DigitsDataModule())
        assert report.report.sites["encoder.layers.1"]["n"] == mine.num_samples()["encoder.layers.1"]
        assert set(report.report.latent) > {"l0", "effective_rank"}
        assert report.report.output["fvu"] > 0

    def test_writes_a_page_and_pictures_into_the_log_folder(self, make_trainer, tmp_path, capsys):
        report = ae.DiagnosticsReport(every_n_steps=2)
        trainer = make_trainer(
            callbacks=report, max_epochs=3, logger=CSVLogger(tmp_path, name="logs"), log_every_n_steps=5
        )
        with pytest.warns(UserWarning, match=r"At step \d+: \[error\] "):
            trainer.fit(mlp(lr=3.0), ae.DigitsDataModule())
        folder = tmp_path / "logs" / "version_0"
        page = (folder / "diagnostics.md").read_text()
        assert "## Findings" in page
        assert "divide the learning rate by 10" in page
        for picture in ("firing_frequencies", "units", "transmission", "progress"):
            assert f"({picture}.png)" in page
            assert (folder / f"{picture}.png").stat().st_size > 5_000
        assert "Findings" in capsys.readouterr().out

    def test_its_fraction_of_variance_unexplained_is_that_of_the_batches_it_saw(self, make_trainer):
        x = torch.rand(256, 6)
        model = ae.MLPAutoencoder(6, 2, hidden=(8,), lr=0.0)
        report = fit(make_trainer, model, ae.TensorDataModule(x, batch_size=64, val_fraction=0.0), epochs=4)
        x_hat = model.reconstruct(x).detach()
        expected = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
        # two of four batches in each epoch
        assert report.report.output["fvu"] == pytest.approx(float(expected), rel=0.05)
        spread = x_hat.var(0).sum() / x.var(0).sum()
        assert report.report.output["spread"] == pytest.approx(float(spread), rel=0.15)

    def test_is_made_of_what_was_seen_before_an_exception(self, make_trainer):
        class Fails(ae.MLPAutoencoder):
            def training_step(self, batch, batch_idx):
                if self.global_step == 15:
                    raise RuntimeError("on purpose")
                return super().training_step(batch, batch_idx)

        report = ae.DiagnosticsReport(every_n_steps=2, quiet=True)
        with pytest.raises(RuntimeError, match="on purpose"):
            make_trainer(callbacks=report).fit(Fails((1, 8, 8), 2, hidden=(8,)), ae.DigitsDataModule())
        assert report.report.sites["encoder.layers.1"]["n"] == 8 * 64

    def test_a_resumed_run_reports_what_an_uninterrupted_one_does(self, make_trainer, tmp_path):
        def run(epochs, path=None):
            L.seed_everything(0, verbose=False)
            report = ae.DiagnosticsReport(every_n_steps=3, quiet=True)
            trainer = make_trainer(callbacks=report, max_epochs=epochs, log_every_n_steps=4)
            trainer.fit(mlp(), ae.DigitsDataModule(), ckpt_path=path, weights_only=True)
            trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return report.report

        whole = run(4)
        run(2)
        resumed = run(4, tmp_path / "2.ckpt")
        assert resumed.sites == whole.sites
        assert resumed.latent == whole.latent
        assert resumed.output == pytest.approx(whole.output)
        assert resumed.findings == whole.findings

    def test_works_on_a_module_without_activations_or_reconstruction(self, make_trainer):
        report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
        make_trainer(callbacks=report, limit_train_batches=4, limit_val_batches=0).fit(BoringModel())
        assert report.report.layers.keys() == {"layer"}
        assert "## Layers" in report.report.to_markdown()


class TestDiagnose:
    def network(self):
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def test_leaves_the_model_as_it_was(self):
        network, x = self.network().train(), torch.rand(32, 3)
        network(x).sum().backward()
        before = copy.deepcopy(network.state_dict())
        gradients = [p.grad.clone() for p in network.parameters()]
        state = torch.get_rng_state()
        ae.diagnose(network, [x], lambda x_hat, x: (x_hat - x).square().mean())
        assert torch.equal(torch.get_rng_state(), state)
        assert network.training
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))

    def test_measures_what_the_monitors_measure_under_a_trainer(self, make_trainer):
        data = ae.TensorDataModule(torch.rand(128, 6), batch_size=32, val_fraction=0.0)
        data.setup("fit")
        model = ae.MLPAutoencoder(6, 2, hidden=(8,), activation="relu", lr=0.0)
        monitor, saturation = ae.DeadReLUMonitor(1), ae.GradientSaturationMonitor(1)
        make_trainer(callbacks=[monitor, saturation]).fit(model, data)
        report = ae.diagnose(model, [torch.cat(list(batches(data)))])
        for site, frequency in monitor.firing_frequency().items():
            assert report.frequencies[site] == frequency.tolist()
            assert report.sites[site]["n"] == 128
        # batches of 32 average their gradients one by one: near, not equal
        for site, value in saturation.transmission().items():
            assert report.sites[site]["transmission"] == pytest.approx(value, rel=0.05)

    def test_a_module_without_a_loss_has_no_gradients(self):
        report = ae.diagnose(self.network().eval(), [torch.rand(16, 3)])
        assert "transmission" not in report.sites["1"]
        assert report.layers == {}

    def test_prints_as_a_table(self):
        network = self.network().eval()
        with torch.no_grad():
            network[0].bias.fill_(-100.0)
        text = str(ae.diagnose(network, [torch.rand(256, 3)], lambda x_hat, x: (x_hat - x).square().mean()))
        assert "[error] 1: All 8 units never fired in 256 samples (rate < 0.01)." in text
        assert "fires" in text.split("Activations")[1].splitlines()[1]

    def test_takes_dicts_lists_and_a_latent_by_name(self):
        network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
        batches = [{"x": torch.rand(64, 3), "label": torch.zeros(64)}] * 2
        report = ae.diagnose(network, batches, lambda x_hat, b: (x_hat - b["x"]).square().mean(), latent="1")
        assert report.latent["samples"] == 128
        assert report.output["samples"] == 128

    def test_errors_say_what_to_do(self):
        with pytest.raises(ValueError, match="batches: expected at least one"):
            ae.diagnose(self.network(), [])
        with pytest.raises(ValueError, match="batches: expected tensors"):
            ae.diagnose(self.network(), [["no tensor"]])

        class Manual(BoringModel):
            def training_step(self, batch, batch_idx):
                return self.optimizers().step()

        with pytest.raises(ValueError, match=r"Manual.training_step does not run without a Trainer.*give a loss"):
            ae.diagnose(Manual(), [torch.rand(4, 32)])

    def test_a_compiled_module_is_looked_at_too(self):
        network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        compiled = torch.compile(network, backend="eager")
        x = torch.rand(16, 3)
        compiled(x)
        assert ae.diagnose(compiled, [x]).frequencies == ae.diagnose(network, [x]).frequencies


def batches(data):
    for batch in data.train_dataloader():
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def test_output_monitor_finds_the_reconstruction_of_a_plain_module():
    network = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))
    x = torch.rand(50, 4)
    assert "fvu" not in ae.diagnose(network, [x]).output  # nothing has compared it with anything
    assert "no loss was heard" in " ".join(str(ae.diagnose(network, [x])).split())
    x_hat = network(x).detach()
    expected = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    for loss in (
        functional.mse_loss,
        functional.l1_loss,
        lambda y, x: ((y - x) ** 2).mean(),
        lambda y, x: (x - y).norm(),
    ):
        assert ae.diagnose(network, [x], loss).output["fvu"] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="every_n_steps"):
        OutputMonitor(every_n_steps=0)


class TestWhatAUserMet:
    """Cases that a first user of the package reported."""

    def plain(self, activation=nn.ReLU):
        class Plain(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), activation(), nn.Linear(64, 8))
                self.dec = nn.Sequential(nn.Linear(8, 64), activation(), nn.Linear(64, 64))
                self.lr, self.decay = 1e-3, 0.0

            def training_step(self, batch, batch_idx):
                x = batch if isinstance(batch, torch.Tensor) else batch[0]
                loss = functional.mse_loss(self.dec(self.encoder(x)), x.flatten(1))
                self.log("loss", loss)
                return loss

            validation_step = training_step

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.decay)

        return Plain()

    def test_a_named_output_of_logits_is_read_through_the_losss_sigmoid(self):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
        x = bytes_of_digits()[:256] / 255

        def loss(a, batch):
            return functional.binary_cross_entropy_with_logits(a, batch.flatten(1))

        found, named = (ae.diagnose(network, [x], loss, output=output).output for output in (None, "3"))
        assert named["output_ratio"] == pytest.approx(1.0, rel=1e-4)
        found, named = found["fvu"], named["fvu"]
        x_hat = network(x).sigmoid().detach()
        expected = (x_hat - x.flatten(1)).square().sum() / (x - x.mean(0)).square().sum()
        assert named == found == pytest.approx(float(expected), rel=1e-4)

    def test_diagnose_after_a_fit_whose_step_logs(self, make_trainer):
        model = self.plain()
        trainer = make_trainer()
        trainer.fit(model, ae.DigitsDataModule())
        data = ae.DigitsDataModule()
        data.prepare_data()
        data.setup("fit")
        assert ae.diagnose(model, data.train_dataloader()).output["fvu"] > 0
        assert model.trainer is trainer
        with pytest.raises(ValueError, match=r"looks like one; give \[batch\]"):
            ae.diagnose(model, (torch.rand(4, 64), torch.rand(4, 64)))

    def test_a_constant_that_moves_while_training_is_a_constant(self, make_trainer):
        model = self.plain()
        with torch.no_grad():
            model.encoder[1].bias.fill_(-100.0)
        report = fit(make_trainer, model, latent="encoder", epochs=10)
        assert report.report.output["spread"] < 1e-6
        assert {"constant_output", "constant_latents", "dead_units"} <= causes(report)
        first = report.findings[0]
        assert (first.site, first.measure) == ("encoder.2", "dead_fraction")

    def test_weight_decay_is_named(self, make_trainer):
        model = self.plain(nn.GELU)
        model.decay = 50.0
        finding = fit(make_trainer, model, epochs=20).findings[0]
        assert finding.cause == "weight_decay"
        assert "weight decay (50)" in finding.evidence
        healthy = self.plain(nn.GELU)
        healthy.decay = 0.01
        assert not measures(fit(make_trainer, healthy, epochs=20), "error")

    def test_what_has_not_reached_the_mean_is_not_said_to_have(self, make_trainer):
        model = self.plain(nn.GELU)
        model.lr = 1e-6
        with torch.no_grad():
            model.dec[2].bias.fill_(3.0)
        finding = fit(make_trainer, model, epochs=4).findings[0]
        assert (finding.cause, finding.change) == ("learning_rate_low", ("learning_rate", +1))

    def test_history_is_of_what_came_since_the_last_log(self, make_trainer):
        class Falling(ae.MLPAutoencoder):
            def objective(self, terms):
                return super().objective(terms) * 0 + 1000.0 - self.global_step

        report = fit(make_trainer, Falling((1, 8, 8), 2, hidden=(8,)), epochs=4)
        # every second step is looked at, and every fifth logs
        for moment, after in zip(report.report.history, report.report.history[1:], strict=False):
            seen = [step for step in range(moment.step, after.step) if step % 2 == 0]
            if seen:
                assert after.loss == pytest.approx(sum(1000.0 - step for step in seen) / len(seen), abs=1e-3)

    def test_one_finding_for_dead_units_everywhere(self, make_trainer):
        model = ae.MLPAutoencoder((1, 8, 8), 8, hidden=(64,) * 3, activation="relu", lr=0.0)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear) and module.out_features == 64:
                    module.bias[:30] = -100.0
        report = fit(make_trainer, model, epochs=2).report
        text = report.to_markdown().partition("## Activations")[0].partition("## Findings")[2]
        assert text.count("In 6 of 6 ReLU layers") == 1
        assert "of 64 units never fired" not in text

    def test_data_that_are_not_finite_are_the_first_and_only_cause(self, make_trainer):
        x = torch.rand(256, 64)
        x[::64, 3] = float("nan")
        report = fit(make_trainer, self.plain(nn.ReLU), ae.TensorDataModule(x, val_fraction=0.0), epochs=2)
        assert next(f.measure for f in report.findings if f.severity == "error") == "nonfinite"
        assert not measures(report) & {"exploded", "nonfinite_units"}

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    def test_data_of_another_scale_are_named(self, make_trainer, scale):
        x = bytes_of_digits() / 255 * scale
        report = fit(make_trainer, self.plain(nn.GELU), ae.TensorDataModule(x, val_fraction=0.0), latent="encoder")
        assert "scale" in measures(report)
        assert "constant" not in measures(report)

    def test_two_monitors_of_one_kind_log_under_names_of_their_own(self, make_trainer):
        both = [ae.DeadReLUMonitor(1, include=[part]) for part in ("encoder", "decoder")]
        model = mlp()
        with torch.no_grad():
            model.encoder.layers[0].bias.fill_(-100.0)
            model.decoder.layers[0].bias.fill_(0.1)
        trainer = make_trainer(callbacks=both)
        trainer.fit(model, ae.DigitsDataModule())
        assert trainer.callback_metrics["dead_relu/dead_fraction"] == 1
        assert trainer.callback_metrics["dead_relu#1/dead_fraction"] < 1
        assert (
            trainer.callback_metrics["dead_relu#1/dead_fraction"] == len(both[1].dead_units()["decoder.layers.1"]) / 64
        )

    def test_an_include_that_fits_nothing_is_warned_of(self, make_trainer):
        with pytest.warns(UserWarning, match=r"saw no activation in \['encodr'\], only \['encoder.layers.1'"):
            make_trainer(callbacks=ae.DeadReLUMonitor(1, include=["encodr"])).fit(mlp(), ae.DigitsDataModule())


class TestHealthyModels:
    def test_a_relu_on_a_relu_changes_nothing_and_one_on_a_tanh_does(self):
        x = torch.rand(128, 4)
        for first, expected in ((nn.ReLU(), False), (nn.Sigmoid(), False), (nn.Tanh(), True)):
            network = nn.Sequential(nn.Linear(4, 8), first, nn.ReLU(), nn.Linear(8, 4))
            report = ae.diagnose(network, [x], functional.mse_loss)
            assert ("twice" in measures(report)) is expected

    def test_rounding_puts_nothing_outside(self):
        network = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
        x = (torch.rand(256, 4) > 0.5) * (1 + 2e-7)
        assert (x > 1).any()
        assert "outside" not in measures(ae.diagnose(network, [x], functional.mse_loss))
        assert "outside" in measures(ae.diagnose(network, [x * 1.01], functional.mse_loss))

    def test_latents_of_a_sparse_code_that_are_off_are_no_dead_layer(self, make_trainer):
        for code, site in ((ae.TopKCode(2), None), (ae.L1Code(0.1, "relu"), "code.relu")):
            model = ae.Autoencoder(nn.Linear(6, 40), nn.Linear(40, 6), code=code, lr=0.0)
            with torch.no_grad():
                model.encoder.bias.fill_(-1.2)
            report = fit(make_trainer, model, ae.TensorDataModule(torch.randn(256, 6), batch_size=64), epochs=2)
            assert report.report.latent["dead_fraction"] > 0
            # what a selection keeps is no unit of a ReLU; the ReLU of a penalised code is one
            assert [name for name in report.report.sites if name.startswith("code.")] == ([site] if site else [])
            # 256 codes with 2 of 40 on, seen twice at most, are too few to call any latent dead
            assert "dead_units" not in causes(report)
            assert not [f for f in report.findings if f.cause == "dead_latents" and f.severity != "info"]

    def test_a_codebook_alone_is_judged_once_enough_was_chosen(self):
        class Indices(nn.Module):
            def forward(self, x):
                return (x[:, 0] > 0.5).long()

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.choose, self.out = Indices(), nn.Linear(4, 4)

            def forward(self, x):
                self.choose(x)
                return self.out(x)

        for examples, expected in ((256, True), (32, False)):
            report = ae.diagnose(
                Network(), [torch.rand(examples, 4)], functional.mse_loss, latent={"indices": "choose", "num_codes": 32}
            )
            assert ("codebook_usage" in measures(report)) is expected

    def test_a_module_in_the_middle_is_no_reconstruction(self):
        x = torch.rand(64, 6)
        network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        assert "fvu" not in ae.diagnose(network, [x], lambda y, x: y.square().mean()).output

    def test_rare_ones_are_no_corner_and_a_corner_is(self):
        network = nn.Sequential(nn.Linear(50, 50), nn.Sigmoid())
        rare = torch.zeros(200, 50)
        rare[::50, 0] = 1.0
        assert "range" not in measures(ae.diagnose(network, [rare], functional.mse_loss))
        assert "range" in measures(ae.diagnose(network, [0.4 + 0.02 * torch.rand(200, 50)], functional.mse_loss))

    @pytest.mark.parametrize(("size", "expected"), [(0.01, False), (1.0, True)])
    def test_an_output_that_is_off_where_the_data_hardly_vary_is_fine(self, size, expected):
        network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        with torch.no_grad():
            network[0].weight.copy_(torch.eye(4))
            network[0].bias.copy_(torch.tensor([0.0, 0.0, 0.0, -10.0]))
        x = torch.rand(200, 4) * torch.tensor([1.0, 1.0, 1.0, size])
        assert ("stuck_outputs" in measures(ae.diagnose(network, [x], functional.mse_loss))) is expected


class TestWhatAHostileUserMet:
    """Runs that work without a report and must work with one."""

    def test_scripted_parts(self, make_trainer):
        class Scripted(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))

            def training_step(self, batch, batch_idx):
                return functional.mse_loss(self.net(batch), batch)

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 1e-2)

        data = torch.utils.data.DataLoader(torch.randn(64, 4), 16)
        report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
        make_trainer(callbacks=report).fit(Scripted(), data)
        assert report.report.output["fvu"] > 0

    def test_a_mean_beside_a_sum_is_named_with_its_number(self, make_trainer):
        class VAE(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.mean, self.log_variance, self.decoder = nn.Linear(64, 4), nn.Linear(64, 4), nn.Linear(4, 64)

            def training_step(self, batch, batch_idx):
                x = batch[0].flatten(1)
                mean, log_variance = self.mean(x), self.log_variance(x)
                z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
                kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
                return functional.binary_cross_entropy_with_logits(self.decoder(z), x) + kl

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 1e-2)

        report = ae.DiagnosticsReport(every_n_steps=2, quiet=True)  # nobody has told it what the latent is
        with pytest.warns(UserWarning, match="no `validation_step`"):
            make_trainer(max_epochs=8, callbacks=report).fit(VAE(), ae.DigitsDataModule())
        (finding,) = [f for f in report.findings if f.cause == "posterior_collapse"]
        assert "a mean over 64 numbers" in finding.advice
        assert "divide the KL by 64" in finding.advice

    def test_without_a_logger_nothing_lands_in_the_current_folder(self, make_trainer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        report = ae.DiagnosticsReport(every_n_steps=2, quiet=True)
        make_trainer(callbacks=report).fit(mlp(), ae.DigitsDataModule())
        assert list(tmp_path.iterdir()) == []
        assert report.report is not None
