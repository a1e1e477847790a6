"""What is heard to be compared, and what is not."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.diagnostics.watch import Watch


class Ear:
    """Keeps the comparisons."""

    def __init__(self):
        self.heard = []

    def on_loss(self, comparison):
        self.heard.append(comparison)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def listen(network, batch, loss, grad=True):
    ear = Ear()
    with Watch().open(network, [ear], None, batch), torch.set_grad_enabled(grad):
        loss(network(batch[0]), *batch)
    return ear.heard


def same(a, b):
    """Whether two comparisons are of the same numbers in the same way."""
    assert a.loss == b.loss
    assert torch.equal(a.prediction, b.prediction)
    assert torch.equal(a.target, b.target)
    assert torch.equal(a.value, b.value)
    assert [made.name for made in a.path] == [made.name for made in b.path]
    assert (a.target_is_data, a.target_learns) == (b.target_is_data, b.target_learns)


def batch(kind):
    x = torch.randn(16, 4)
    targets = {"real": torch.randn(16, 3), "binary": (torch.rand(16, 3) > 0.5).float(), "classes": x.argmax(1) % 3}
    return x, targets[kind]


network = pytest.fixture(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))


class TestTorchsLosses:
    @pytest.mark.parametrize(
        ("module", "function", "kind"),
        [
            (nn.MSELoss, functional.mse_loss, "real"),
            (nn.L1Loss, functional.l1_loss, "real"),
            (nn.SmoothL1Loss, functional.smooth_l1_loss, "real"),
            (nn.HuberLoss, functional.huber_loss, "real"),
            (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits, "binary"),
            (nn.MultiLabelSoftMarginLoss, functional.multilabel_soft_margin_loss, "binary"),
            (nn.CrossEntropyLoss, functional.cross_entropy, "classes"),
        ],
    )
    def test_as_function_and_as_module(self, network, module, function, kind):
        given = batch(kind)
        (a,) = listen(network, given, lambda p, x, y: function(p, y))
        (b,) = listen(network, given, lambda p, x, y: module()(p, y))
        (c,) = listen(network, given, lambda p, x, y: function(input=p, target=y))
        same(a, b)
        same(a, c)
        assert a.loss == function.__name__
        assert torch.equal(a.prediction, network(given[0]))
        assert torch.equal(a.target, given[1])
        assert torch.equal(a.value, function(network(given[0]), given[1]))
        assert [made.name for made in a.path] == ["layer"]
        assert a.target_is_data

    def test_probabilities(self, network):
        given = batch("binary")
        (a,) = listen(network, given, lambda p, x, y: functional.binary_cross_entropy(p.sigmoid(), y))
        (b,) = listen(network, given, lambda p, x, y: nn.BCELoss()(torch.sigmoid(p), y))
        same(a, b)
        assert [made.name for made in a.path] == ["sigmoid", "layer"]

    @pytest.mark.parametrize(
        ("end", "name"),
        [(nn.Softmax(1), "softmax"), (nn.LogSoftmax(1), "log_softmax"), (nn.Sigmoid(), "sigmoid"), (nn.ReLU(), "relu")],
    )
    def test_the_way_of_a_prediction_since_the_last_layer(self, network, end, name):
        given = batch("real")
        (a,) = listen(nn.Sequential(*network, end, nn.Dropout(0.5)), given, lambda p, x, y: functional.mse_loss(p, y))
        assert [made.name for made in a.path] == ["dropout", name, "layer"]
        assert a.path[0].rate == 0.5
        assert a.path[1].width == (3 if "softmax" in name else 0)

    def test_options(self, network):
        given, weight = batch("classes"), torch.ones(3)
        for loss in (
            lambda p, x, y: functional.cross_entropy(p, y, weight),
            lambda p, x, y: functional.cross_entropy(p, y, weight=weight),
            lambda p, x, y: nn.CrossEntropyLoss(weight)(p, y),
        ):
            (a,) = listen(network, given, loss)
            assert a.options["weight"] is weight

    def test_swapped_arguments(self, network):
        given = batch("real")
        (a,) = listen(network, given, lambda p, x, y: functional.mse_loss(y, p))
        assert torch.equal(a.prediction, network(given[0]))
        assert torch.equal(a.target, given[1])
        assert a.target_is_data
        assert not a.target_learns

    def test_a_target_that_learns_or_is_no_data(self, network):
        (a,) = listen(network, batch("real"), lambda p, x, y: functional.mse_loss(p, p.flip(0)))
        assert (a.target_is_data, a.target_learns) == (False, True)
        (a,) = listen(network, batch("real"), lambda p, x, y: functional.mse_loss(p, torch.ones(16, 3)))
        assert (a.target_is_data, a.target_learns) == (False, False)


class TestWrittenOut:
    @pytest.mark.parametrize(
        ("loss", "name"),
        [
            (lambda p, x, y: ((p - y) ** 2).mean(), "squared difference"),
            (lambda p, x, y: (y - p).pow(2).sum(), "squared difference"),
            (lambda p, x, y: torch.square(torch.sub(p, y)).mean(), "squared difference"),
            (lambda p, x, y: ((d := p - y) * d).mean(), "squared difference"),
            (lambda p, x, y: (p - y).norm(), "squared difference"),
            (lambda p, x, y: torch.linalg.norm(y - p), "squared difference"),
            (lambda p, x, y: (p - y).abs().mean(), "absolute difference"),
        ],
    )
    def test_differences(self, network, loss, name):
        given = batch("real")
        (a,) = listen(network, given, loss)
        assert a.loss == name
        assert torch.equal(a.prediction, network(given[0]))
        assert torch.equal(a.target, given[1])

    def test_a_target_made_of_the_batch(self, network):
        given = batch("real")
        (a,) = listen(network, given, lambda p, x, y: ((p - (2 * y - 1)) ** 2).mean())
        assert torch.equal(a.target, 2 * given[1] - 1)

    def test_logarithms(self, network):
        x, y = batch("classes")
        given = x, functional.one_hot(y, 3).float()
        (a,) = listen(network, given, lambda p, x, y: -(y * functional.log_softmax(p, 1)).sum(1).mean())
        (b,) = listen(network, given, lambda p, x, y: -(y * p.softmax(1).log()).sum(1).mean())
        assert a.loss == "target × log_softmax"
        assert b.loss == "target × log"
        assert torch.equal(a.prediction, network(x))
        assert torch.equal(b.prediction, network(x).softmax(1))
        for found in (a, b):
            assert torch.equal(found.target, given[1])
            assert found.value.sum().item() / 16 == pytest.approx(functional.cross_entropy(network(x), y).item())

    def test_which_prediction_it_was(self, network):
        known = []

        def loss(p, x, y):
            known.append(id(p))
            return functional.mse_loss(p, y) + ((p - y) ** 2).mean() + functional.l1_loss(y, p)

        heard = listen(network, batch("real"), loss)
        assert [a.loss for a in heard] == ["mse_loss", "squared difference", "l1_loss"]
        assert [a.key for a in heard] == known * 3

    def test_differences_that_nobody_squares(self, network):
        assert listen(network, batch("real"), lambda p, x, y: (p - y).mean()) == []

    def test_a_difference_with_a_number_and_of_two_predictions(self, network):
        assert listen(network, batch("real"), lambda p, x, y: ((p - 1.0) ** 2).mean()) == []
        assert listen(network, batch("real"), lambda p, x, y: ((p - p.mean()) ** 2).mean()) == []

    def test_what_is_subtracted_from_the_input_by_a_dictionary(self):
        class Dictionary(nn.Module):
            def __init__(self):
                super().__init__()
                self.b_dec = nn.Parameter(torch.zeros(4))
                self.encoder, self.decoder = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

            def forward(self, x):
                centred = x - self.b_dec
                self.size = centred.norm(dim=1)
                return self.decoder(self.encoder(centred).relu()) + self.b_dec

        heard = listen(Dictionary(), (torch.randn(16, 4),), lambda p, x: ((p - x) ** 2).sum(1).mean())
        assert [a.loss for a in heard] == ["squared difference"]
        assert heard[0].prediction.shape == (16, 4)
        assert [made.name for made in heard[0].path][:1] == ["add"]


class TestWhatIsNotHeard:
    def test_a_figure_for_a_log(self, network):
        def loss(p, x, y):
            with torch.no_grad():
                functional.l1_loss(p, y)
                ((p - y) ** 2).mean()
            functional.l1_loss(p.detach(), y)
            return functional.mse_loss(p, y)

        assert [a.loss for a in listen(network, batch("real"), loss)] == ["mse_loss"]

    def test_anything_without_gradients_in_training(self, network):
        assert listen(network, batch("real"), lambda p, x, y: functional.mse_loss(p, y), grad=False) == []
        assert listen(network, batch("real"), lambda p, x, y: ((p - y) ** 2).mean(), grad=False) == []

    def test_what_comes_out_without_a_gradient(self, network):
        """The prediction needs one, what is made of it does not."""

        def loss(p, x, y):
            assert p.requires_grad
            with torch.no_grad():
                for function in (functional.mse_loss, functional.l1_loss, functional.huber_loss):
                    function(p, y)
                ((p - y) ** 2).sum()
                (y * p.log_softmax(1)).sum()
            return functional.smooth_l1_loss(p, y)

        assert [a.loss for a in listen(network, batch("real"), loss)] == ["smooth_l1_loss"]

    def test_a_selection_that_is_empty(self, network):
        def loss(p, x, y):
            none = y[:, 0] > 1e9
            return (
                functional.mse_loss(p[none], y[none], reduction="sum")
                + functional.cross_entropy(p[none], y[none].argmax(1), reduction="sum")
                + ((p[none] - y[none]) ** 2).sum()
                + p.sum()
            )

        assert listen(network, batch("real"), loss) == []

    def test_a_margin_and_what_is_spread_over_devices(self, network):
        assert listen(network, batch("real"), lambda p, x, y: functional.soft_margin_loss(p, y.sign())) == []

        def spread(p, x, y):
            p.to_local = lambda: p  # as a DTensor has it
            return functional.mse_loss(p, y)

        assert listen(network, batch("real"), spread) == []

    def test_torchs_losses_are_heard_in_evaluation(self, network):
        heard = listen(network.eval(), batch("real"), lambda p, x, y: functional.mse_loss(p, y), grad=False)
        assert [a.loss for a in heard] == ["mse_loss"]

    def test_metrics_of_a_training_step(self, make_trainer):
        class Module(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.network = nn.Linear(4, 3)
                self.error, self.mean = torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()
                self.several = torchmetrics.MetricCollection(
                    {"r2": torchmetrics.R2Score(), "huber": torchmetrics.LogCoshError(3)}
                )
                self.hits = torchmetrics.Accuracy("multiclass", num_classes=3)

            def training_step(self, batch, batch_idx):
                p = self.network(batch[0])
                self.error(p, batch[1])
                self.log("error", self.error)
                self.mean.update(p.detach(), batch[1])
                torchmetrics.functional.mean_squared_error(p.detach(), batch[1])
                # what needs a gradient is given to some on purpose, and one is no part of the model
                self.several(p, batch[1])
                self.several["r2"].update(p, batch[1])
                torchmetrics.MeanSquaredError()(p, batch[1])
                self.hits(p, batch[1].argmax(1))
                return functional.smooth_l1_loss(p, batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        report = ae.DiagnosticsReport(every_n_steps=1, quiet=True)
        data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randn(32, 3))
        make_trainer(callbacks=report).fit(Module(), torch.utils.data.DataLoader(data, 8))
        assert list(report.report.compared) == ["smooth_l1_loss"]


class TestWhatIsNoReasonToStop:
    """A fit goes on whatever a step does, and whatever a listener makes of it."""

    class Module(L.LightningModule):
        def __init__(self, run):
            super().__init__()
            self.network, self.run, self.steps = nn.Linear(4, 3), run, 0
            self.register_buffer("graph", torch.eye(8).to_sparse(), persistent=False)

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return self.run(self, self.network(batch[0]), *batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    @pytest.fixture
    def fit(self, make_trainer):
        def run(step, *callbacks):
            module, report = self.Module(step), ae.DiagnosticsReport(every_n_steps=1, quiet=True)
            data = torch.utils.data.TensorDataset(torch.randn(48, 4), torch.randn(48, 3))
            trainer = make_trainer(callbacks=[report, *callbacks])
            trainer.fit(module, torch.utils.data.DataLoader(data, 8))
            assert module.steps == trainer.global_step == 6
            return report

        return run

    def test_a_selection_that_is_empty_in_some_steps(self, fit, recwarn):
        def step(module, p, x, y):
            chosen = (y[:, 0] > 0) & (module.steps % 2 == 0)
            parts = functional.mse_loss(p[chosen], y[chosen], reduction="sum")
            return parts + functional.smooth_l1_loss(p, y)

        report = fit(step)
        assert set(report.report.compared) == {"mse_loss", "smooth_l1_loss"}
        assert not [w for w in recwarn if "could not" in str(w.message)]

    @pytest.mark.parametrize(
        "product",
        [
            lambda graph, h: graph @ h,
            lambda graph, h: torch.sparse.mm(graph, h),
            lambda graph, h: (graph * 2.0).coalesce() @ h,
            lambda graph, h: graph.to_dense() @ h,
            lambda graph, h: torch.mul(graph, graph).abs() @ h,
            lambda graph, h: graph.to_sparse_csr() @ h,
        ],
    )
    def test_a_sparse_matrix(self, fit, recwarn, product):
        report = fit(lambda module, p, x, y: functional.mse_loss(product(module.graph, p), y))
        assert list(report.report.compared) == ["mse_loss"]
        assert not [w for w in recwarn if "could not" in str(w.message)]

    def test_a_listener_that_raises_is_said_once(self, fit, recwarn):
        class Broken(OutputMonitor):
            calls = 0

            def on_loss(self, comparison):
                self.calls += 1
                raise RuntimeError("no ear for it")

        broken = Broken(None, 1)
        report = fit(lambda module, p, x, y: functional.mse_loss(p, y), broken)
        assert broken.calls == 6
        assert [str(w.message) for w in recwarn if "no ear for it" in str(w.message)] == [
            "Broken could not read a step and goes on without it: RuntimeError: no ear for it"
        ]
        assert list(report.report.compared) == ["mse_loss"]  # the others hear it all the same


class TestWhatIsNoReconstruction:
    def test_a_classifier_of_two_features_into_two_classes(self):
        x = torch.randn(128, 2)
        classifier = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        for y in (x.argmax(1), functional.one_hot(x.argmax(1), 2).float()):
            report = ae.diagnose(classifier, [(x, y)], lambda p, batch: functional.cross_entropy(p, batch[1]))
            assert list(report.compared) == ["cross_entropy"]
            # of classes it speaks as of targets, not as of data
            assert not any(f.cause in ("skip_connection", "narrow_code", "constant_data") for f in report.findings)
        heard = listen(classifier, (x, x.argmax(1)), lambda p, x, y: functional.cross_entropy(p, y))
        assert [a.loss for a in heard] == ["cross_entropy"]
        assert heard[0].target.shape == (128,)

    def test_a_regression_with_as_many_targets_as_inputs(self):
        network, x, y = nn.Linear(4, 4), torch.randn(64, 4), torch.randn(64, 4)
        for target, expected in ((y, None), (x, "mse_loss")):
            monitor = OutputMonitor(None, 1)
            with Watch().open(network, [monitor], None, (x, target)):
                functional.mse_loss(network(x), target)
            monitor.on_batch(None, network, None, (x, target))
            assert monitor.reconstruction() == expected
