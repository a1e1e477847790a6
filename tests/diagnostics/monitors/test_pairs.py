"""Figures of a comparison against closed forms, numpy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, r2_score
from torch import nn
from torch.nn import functional

import lightning_ae as ae
from lightning_ae.diagnostics.monitors.output import OutputMonitor
from lightning_ae.diagnostics.watch import Watch


def heard(network, batches, loss):
    """Monitor that has listened to a loss of (prediction, batch) on some batches."""
    monitor, watch = OutputMonitor(None, 1), Watch()
    for batch in batches:
        with watch.open(network, [monitor], None, batch):
            value = loss(network(batch[0]), batch)
        with torch.no_grad():
            monitor.counters.add("", "samples", len(batch[0]))
            monitor.on_batch(None, network, {"loss": value}, batch)
    return monitor


def figures(network, batches, loss):
    return heard(network, batches, loss).figures()


class Given(nn.Module):
    """Predicts what it is given, times a number that learns."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.one


def split(*tensors, parts=4):
    return list(zip(*(t.chunk(parts) for t in tensors), strict=True))


class TestRealNumbers:
    @pytest.mark.parametrize(("centre", "spread"), [(1000.0, 0.1), (0.0, 1.0), (-5.0, 100.0)])
    def test_unexplained_variance_of_data_far_from_zero(self, centre, spread):
        y = centre + spread * torch.randn(256, 5)
        y_hat = y + 0.5 * spread * torch.randn(256, 5)
        found = figures(Given(), split(y_hat, y), lambda p, batch: functional.mse_loss(p, batch[1]))
        reference = y.double().numpy()
        error = ((y_hat.double().numpy() - reference) ** 2).sum()
        assert found["fvu"] == pytest.approx(error / ((reference - reference.mean(0)) ** 2).sum(), rel=1e-3)
        assert found["fvu"] == pytest.approx(
            1 - r2_score(reference, y_hat.double().numpy(), multioutput="variance_weighted"), rel=1e-3
        )
        assert found["relative"] == found["fvu"]
        assert found["x_mean"] == pytest.approx(reference.mean())
        assert found["x_std"] == pytest.approx(reference.std(), rel=1e-3)
        within = sum(part.double().var(0, correction=0).sum().item() for part in y.chunk(4))
        theirs = sum(part.double().var(0, correction=0).sum().item() for part in y_hat.chunk(4))
        assert found["spread"] == pytest.approx(theirs / within, rel=1e-3)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
    def test_targets_of_any_shape(self, shape):
        y = torch.randn(64, *shape)
        y_hat = y + torch.randn(64, *shape)
        found = figures(Given(), split(y_hat, y), lambda p, batch: functional.mse_loss(p, batch[1]))
        a, b = y_hat.double().reshape(64, -1), y.double().reshape(64, -1)
        assert found["fvu"] == pytest.approx(((a - b).square().sum() / (b - b.mean(0)).square().sum()).item(), rel=1e-4)
        assert found["columns"] == b.shape[1]
        assert found["samples"] == 64

    @pytest.mark.parametrize(
        "loss",
        [
            functional.mse_loss,
            functional.l1_loss,
            functional.smooth_l1_loss,
            functional.huber_loss,
            lambda p, y: ((p - y) ** 2).mean(),
            lambda p, y: ((y - p) ** 2).mean(),
            lambda p, y: (p - y).pow(2).sum(),
            lambda p, y: torch.pow(p - y, 2).mean(),
            lambda p, y: (p - y).square().mean(),
            lambda p, y: ((d := y - p) * d).mean(),
            lambda p, y: (p - y).abs().mean(),
            lambda p, y: torch.abs(torch.sub(p, y)).mean(),
            lambda p, y: (p - y).norm(),
            lambda p, y: torch.linalg.norm(p - y),
            lambda p, y: torch.linalg.vector_norm(p - y),
        ],
    )
    def test_losses_of_torch_and_by_hand(self, loss):
        y = torch.randn(64, 3)
        y_hat = y + torch.randn(64, 3)
        monitor = heard(Given(), [(y_hat, y)], lambda p, batch: loss(p, batch[1]))
        assert len(monitor.pairs) == 1
        expected = (y_hat - y).square().sum() / (y - y.mean(0)).square().sum()
        assert monitor.figures()["fvu"] == pytest.approx(expected.item(), rel=1e-4)


class TestClasses:
    @pytest.fixture
    def data(self):
        logits = torch.randn(200, 5) * 2
        return logits, torch.multinomial(torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0]), 200, replacement=True)

    @pytest.mark.parametrize(
        "loss",
        [
            functional.cross_entropy,
            lambda p, y: functional.cross_entropy(p, y, reduction="sum"),
            lambda p, y: functional.cross_entropy(p, y, reduction="none").mean(),
            lambda p, y: nn.CrossEntropyLoss()(p, y),
            lambda p, y: functional.nll_loss(p.log_softmax(1), y),
        ],
    )
    def test_relative_is_cross_entropy_over_label_entropy(self, data, loss):
        logits, y = data
        found = figures(Given(), split(logits, y), lambda p, batch: loss(p, batch[1]))
        counts = np.bincount(y.numpy(), minlength=5)
        share = counts[counts > 0] / counts.sum()
        entropy = -(share * np.log(share)).sum()
        cross = log_loss(y.numpy(), logits.double().softmax(1).numpy(), labels=range(5))
        assert found["label_entropy"] == pytest.approx(entropy)
        assert found["relative"] == pytest.approx(cross / entropy, rel=1e-4)
        assert found["accuracy"] == pytest.approx(accuracy_score(y.numpy(), logits.argmax(1).numpy()))
        assert found["classes"] == (counts > 0).sum()
        assert found["largest_class"] == pytest.approx(share.max())

    def test_counts_of_classes(self, data):
        logits, y = data
        monitor = heard(Given(), split(logits, y), lambda p, batch: functional.cross_entropy(p, batch[1]))
        assert monitor.results()["cross_entropy", "classes"].tolist() == np.bincount(y.numpy(), minlength=5).tolist()

    def test_one_that_is_ignored_is_not_counted(self, data):
        logits, y = data
        y = y.clone()
        y[:50] = -100
        monitor = heard(Given(), [(logits, y)], lambda p, batch: functional.cross_entropy(p, batch[1]))
        assert monitor.results()["cross_entropy", "classes"].sum() == 150

    @pytest.mark.parametrize("options", [{"weight": torch.arange(1.0, 6.0)}, {"label_smoothing": 0.1}])
    def test_with_weights_of_classes_or_smooth_labels_there_is_no_relative(self, data, options):
        logits, y = data
        for target in (y, functional.one_hot(y, 5).float()):
            found = figures(Given(), [(logits, target)], lambda p, b: functional.cross_entropy(p, b[1], **options))
            assert "relative" not in found
            assert found["value"] == pytest.approx(functional.cross_entropy(logits, target, **options).item())
        found = figures(Given(), [(logits, y)], lambda p, b: functional.cross_entropy(p, b[1], **options))
        counts = np.bincount(y.numpy(), minlength=5)
        share = counts[counts > 0] / counts.sum()
        assert found["accuracy"] == pytest.approx(accuracy_score(y.numpy(), logits.argmax(1).numpy()))
        assert found["largest_class"] == pytest.approx(share.max())
        assert found["label_entropy"] == pytest.approx(-(share * np.log(share)).sum())

    @pytest.mark.parametrize(
        "loss",
        [
            functional.cross_entropy,
            lambda p, y: -(y * functional.log_softmax(p, 1)).sum(1).mean(),
            lambda p, y: -(functional.log_softmax(p, 1) * y).sum(1).mean(),
            lambda p, y: -(y * p.softmax(1).log()).sum(1).mean(),
            lambda p, y: -(y * torch.log(p.softmax(1) + 1e-9)).sum(1).mean(),
            lambda p, y: -(y * p.softmax(1).clamp(1e-9, 1).log()).sum() / len(y),
        ],
    )
    def test_rows_with_one_one(self, data, loss):
        logits, y = data
        one_hot = functional.one_hot(y, 5).float()
        monitor = heard(Given(), [(logits, one_hot)], lambda p, batch: loss(p, batch[1]))
        assert len(monitor.pairs) == 1
        (pair,) = monitor.pairs.values()
        assert pair.activation == "softmax"
        found = monitor.figures()
        assert (found["binary"], found["one_in_a_row"], found["several_in_a_row"]) == (1, 1, 0)
        counts = np.bincount(y.numpy())
        share = counts / counts.sum()
        cross = log_loss(y.numpy(), logits.double().softmax(1).numpy(), labels=range(5))
        assert found["relative"] == pytest.approx(cross / -(share * np.log(share)).sum(), rel=1e-3)

    def test_rows_with_several_ones(self):
        y = (torch.rand(100, 4) > 0.5).float()
        found = figures(Given(), [(torch.randn(100, 4), y)], lambda p, b: functional.mse_loss(p, b[1]))
        assert found["one_in_a_row"] == pytest.approx((y.sum(1) == 1).float().mean().item())
        assert found["several_in_a_row"] == pytest.approx((y.sum(1) > 1).float().mean().item())


def soft_cross_entropy(logits, shares):
    """Loss, that of the mean shares, and the entropy of the shares themselves, of rows."""
    q, t = logits.double().log_softmax(1), shares.double()
    mean = t.mean(0)
    return (-(t * q).sum(1).mean(), -torch.xlogy(mean, mean).sum(), -torch.xlogy(t, t).sum(1).mean())


class TestPositions:
    """Cross-entropy over the positions of a map or a sequence: classes are on axis 1."""

    reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

    @reductions
    @pytest.mark.parametrize("places", [(7,), (3, 2)])
    def test_shares_have_a_row_for_each_position(self, reduction, places):
        logits, shares = torch.randn(16, 5, *places), torch.randn(16, 5, *places).softmax(1)

        def loss(p, batch):
            return functional.cross_entropy(p, batch[1], reduction=reduction).mean()

        found = figures(Given(), split(logits, shares), loss)
        rows = [t.movedim(1, -1).reshape(-1, 5) for t in (logits, shares)]
        cross, best, floor = soft_cross_entropy(*rows)
        assert (found["samples"], found["columns"]) == (len(rows[0]), 5)
        assert found["value"] == pytest.approx(functional.cross_entropy(logits, shares).item(), rel=1e-5)
        assert found["value"] == pytest.approx(cross.item(), rel=1e-5)
        assert found["relative"] == pytest.approx(((cross - floor) / (best - floor)).item(), rel=1e-4)
        expected = rows[0].double().softmax(1) - rows[1]
        within = rows[1].double() - rows[1].double().mean(0)
        assert found["fvu"] == pytest.approx((expected.square().sum() / within.square().sum()).item(), rel=1e-4)

    @reductions
    @pytest.mark.parametrize("places", [(7,), (3, 2)])
    def test_indices(self, reduction, places):
        logits, y = torch.randn(16, 5, *places), torch.randint(4, (16, *places))

        def loss(p, batch):
            return functional.cross_entropy(p, batch[1], reduction=reduction).mean()

        monitor = heard(Given(), split(logits, y), loss)
        counts = np.bincount(y.flatten().numpy(), minlength=5)
        assert monitor.results()["cross_entropy", "classes"].tolist() == counts.tolist()
        share = counts[counts > 0] / counts.sum()
        entropy = -(share * np.log(share)).sum()
        found = monitor.figures()
        assert found["label_entropy"] == pytest.approx(entropy)
        assert found["relative"] == pytest.approx(functional.cross_entropy(logits, y).item() / entropy, rel=1e-5)


class TestIgnored:
    @pytest.mark.parametrize("index", [-100, 3, 255])
    def test_rows_are_left_out_of_counts_and_hits(self, index):
        logits, y = torch.randn(200, 4), torch.randint(3, (200,))
        y[:50] = index
        # were they counted, all of them would be hits
        logits[:50, max(0, min(index, 3))] = 100.0
        monitor = heard(Given(), split(logits, y), lambda p, b: functional.cross_entropy(p, b[1], ignore_index=index))
        kept = y[50:].numpy()
        counts = np.bincount(kept, minlength=4)
        assert monitor.results()["cross_entropy", "classes"].tolist() == counts.tolist()
        assert int(monitor.results()["cross_entropy", "tries"]) == 150
        hits = accuracy_score(kept, logits[50:].argmax(1).numpy())
        assert monitor.figures()["accuracy"] == pytest.approx(hits)
        assert monitor.labels().tolist() == counts.tolist()

    def test_relative_is_that_of_the_others(self):
        logits, y = torch.randn(200, 4), torch.randint(3, (200,))
        y[::4] = -100
        found = figures(Given(), [(logits, y)], lambda p, b: functional.cross_entropy(p, b[1]))
        kept = y[y >= 0].numpy()
        share = np.bincount(kept) / len(kept)
        cross = log_loss(kept, logits[y >= 0].double().softmax(1).numpy(), labels=range(4))
        assert found["relative"] == pytest.approx(cross / -(share * np.log(share)).sum(), rel=1e-5)


class TestBinary:
    @pytest.mark.parametrize("grey", [True, False])
    @pytest.mark.parametrize("kind", ["logits", "probabilities", "sum", "none"])
    def test_relative_leaves_out_what_no_prediction_could_save(self, grey, kind):
        y = torch.rand(200, 3) ** 2
        y = y if grey else y.round()
        logits = torch.randn(200, 3)

        def loss(p, batch):
            if kind == "probabilities":
                return functional.binary_cross_entropy(p.sigmoid(), batch[1])
            reduction = kind if kind in ("sum", "none") else "mean"
            return functional.binary_cross_entropy_with_logits(p, batch[1], reduction=reduction).mean()

        found = figures(Given(), split(logits, y), loss)
        p, t = logits.double().sigmoid(), y.double()

        def entropy(q, t):
            return (-torch.xlogy(t, q) - torch.xlogy(1 - t, 1 - q)).mean()

        best, floor = entropy(t.mean(0).expand_as(t), t), entropy(t, t)
        assert found["relative"] == pytest.approx(((entropy(p, t) - floor) / (best - floor)).item(), rel=1e-3)

    def test_a_constant_is_one_and_a_perfect_prediction_nothing(self):
        y = 0.2 + 0.6 * torch.rand(400, 3)
        loss = lambda p, batch: functional.binary_cross_entropy_with_logits(p, batch[1])  # noqa: E731
        assert figures(Given(), [(y.mean(0).logit().expand(400, 3), y)], loss)["relative"] == pytest.approx(1, abs=1e-3)
        assert figures(Given(), [(y.logit(), y)], loss)["relative"] == pytest.approx(0, abs=1e-3)

    @pytest.mark.parametrize("options", [{"pos_weight": torch.tensor([3.0])}, {"weight": torch.tensor([3.0])}])
    def test_with_weights_there_is_no_relative(self, options):
        y, logits = (torch.rand(200, 3) > 0.7).float(), torch.randn(200, 3)
        found = figures(
            Given(), [(logits, y)], lambda p, b: functional.binary_cross_entropy_with_logits(p, b[1], **options)
        )
        assert "relative" not in found
        expected = (logits.sigmoid() - y).square().sum() / (y - y.mean(0)).square().sum()
        assert found["fvu"] == pytest.approx(expected.item(), rel=1e-4)


def unexplained(y_hat, y):
    """By numpy, of rows and columns."""
    a, b = (t.detach().double().reshape(len(t), -1).numpy() for t in (y_hat, y))
    return ((a - b) ** 2).sum() / ((b - b.mean(0)) ** 2).sum()


class TestLogarithms:
    """Losses whose prediction is the logarithm of what is compared."""

    @pytest.mark.parametrize("log_target", [True, False])
    def test_kl_div(self, log_target):
        scores, shares = torch.randn(200, 4), (2 * torch.randn(200, 4)).softmax(1)
        target = shares.log() if log_target else shares

        def loss(p, batch):
            return functional.kl_div(p.log_softmax(1), batch[1], reduction="batchmean", log_target=log_target)

        found = figures(Given(), split(scores, target), loss)
        assert found["x_mean"] == pytest.approx(shares.mean().item(), rel=1e-5)
        assert found["fvu"] == pytest.approx(unexplained(scores.softmax(1), shares), rel=1e-4)
        assert found["relative"] == found["fvu"]
        assert found["below_zero"] == found["above_one"] == 0

    @pytest.mark.parametrize("log_input", [True, False])
    def test_poisson(self, log_input):
        rates = torch.rand(200, 3) * 5 + 0.1
        y = torch.poisson(rates)
        given = rates.log() if log_input else rates

        def loss(p, batch):
            return functional.poisson_nll_loss(p, batch[1], log_input=log_input)

        found = figures(Given(), split(given, y), loss)
        assert found["x_hat_mean"] == pytest.approx(rates.mean().item(), rel=1e-5)
        assert found["fvu"] == pytest.approx(unexplained(rates, y), rel=1e-4)
        assert found["relative"] == found["fvu"]


class TestRobust:
    @pytest.mark.parametrize(
        ("loss", "reference"),
        [
            (functional.l1_loss, functional.l1_loss),
            (lambda p, y: (p - y).abs().mean(), functional.l1_loss),
            (functional.smooth_l1_loss, functional.smooth_l1_loss),
            (functional.huber_loss, functional.huber_loss),
            *((lambda p, y, b=b: functional.smooth_l1_loss(p, y, beta=b),) * 2 for b in (0.1, 3.0)),
            *((lambda p, y, d=d: functional.huber_loss(p, y, delta=d),) * 2 for d in (0.1, 3.0)),
        ],
    )
    def test_relative_is_the_loss_over_that_of_the_median(self, loss, reference):
        y = torch.randn(36, 3)
        y[::9] += 1000.0  # outliers rule a squared error
        y_hat = y + 0.1 * torch.randn(36, 3)
        y_hat[::9] -= 1000.0
        found = figures(Given(), split(y_hat, y), lambda p, b: loss(p, b[1]))
        # of an odd number of rows the median is one of them
        guess = torch.cat([torch.from_numpy(np.median(part.numpy(), 0)).expand(9, 3) for part in y.chunk(4)])
        ratio = reference(y_hat.double(), y.double()) / reference(guess.double(), y.double())
        assert found["relative"] == pytest.approx(ratio.item(), rel=1e-4)
        assert found["fvu"] == pytest.approx(unexplained(y_hat, y), rel=1e-3)

    def test_outliers_that_are_left_alone_do_not_hide_what_was_learnt(self):
        y = torch.randn(90, 1)
        y_hat = y.clone()
        y[::30] += 1000.0  # what is predicted are the others, exactly
        found = figures(Given(), [(y_hat, y)], lambda p, b: functional.huber_loss(p, b[1]))
        assert found["fvu"] > 0.9
        clean = functional.huber_loss(torch.from_numpy(np.median(y.numpy(), 0)).expand(90, 1), y)
        assert found["relative"] == pytest.approx((functional.huber_loss(y_hat, y) / clean).item(), abs=0.01)


class TestSequences:
    @pytest.mark.parametrize("features", [(), (3,), (2, 3)])
    def test_of_several_lengths(self, features):
        batches = []
        for length in (5, 9, 4, 7):
            y = 5 + torch.randn(6, length, *features)
            batches.append((y + 0.5 * torch.randn_like(y), y))
        monitor = heard(Given(), batches, lambda p, b: functional.mse_loss(p, b[1]))
        (pair,) = monitor.pairs.values()
        assert pair.ragged
        # what came before it was known that lengths change is left out
        y_hat, y = (
            torch.cat([batch[i].reshape(-1, features[-1] if features else 1) for batch in batches[1:]]) for i in (0, 1)
        )
        found = monitor.figures()
        assert found["fvu"] == pytest.approx(unexplained(y_hat, y), rel=1e-4)
        assert found["samples"] == len(y)
        assert found["columns"] == y.shape[1]

    def test_of_one_length_keep_their_columns(self):
        y = torch.randn(24, 5, 3)
        y_hat = y + torch.randn(24, 5, 3)
        monitor = heard(Given(), split(y_hat, y), lambda p, b: functional.mse_loss(p, b[1]))
        assert not next(iter(monitor.pairs.values())).ragged
        assert monitor.figures()["columns"] == 15
        assert monitor.figures()["fvu"] == pytest.approx(unexplained(y_hat, y), rel=1e-4)


class TestManyColumns:
    @pytest.mark.parametrize(("number", "step"), [(2**14, 1), (2**14 + 1, 2), (2**15 + 1, 3)])
    def test_are_thinned(self, number, step):
        y = torch.randn(8, number)
        y_hat = y + torch.randn(8, number)
        found = figures(Given(), [(y_hat, y)], lambda p, b: functional.mse_loss(p, b[1]))
        kept = len(range(0, number, step))
        assert found["columns"] == kept <= 2**14
        assert found["fvu"] == pytest.approx(unexplained(y_hat[:, ::step], y[:, ::step]), rel=1e-4)
        assert found["value"] == pytest.approx((y_hat - y).square().mean().item(), rel=1e-5)


class TestStarved:
    @pytest.mark.parametrize("end", [torch.sigmoid, torch.tanh])
    def test_share_of_what_is_wrong_that_gets_next_to_no_gradient(self, end):
        z = 6 * torch.randn(300, 4)
        y = end(z + torch.randn(300, 4))
        found = figures(Given(), split(z, y), lambda p, b: functional.mse_loss(end(p), b[1]))
        z = z.double().requires_grad_()
        error = end(z) - y
        (gradient,) = torch.autograd.grad(error.square().sum(), z)
        wrong = error.abs() > 0.01
        starved = wrong & (gradient.abs() < 0.01 * error.abs())
        assert 0 < starved.sum() < wrong.sum()
        assert found["starved"] == pytest.approx((starved.sum() / wrong.sum()).item(), abs=1e-3)

    @pytest.mark.parametrize("end", [torch.relu, lambda p: p, lambda p: 2 * torch.sigmoid(p)])
    def test_of_others_it_is_not_known(self, end):
        z, y = 6 * torch.randn(64, 4), torch.rand(64, 4)
        assert figures(Given(), [(z, y)], lambda p, b: functional.mse_loss(end(p), b[1]))["starved"] == 0


class TestShapes:
    def test_a_column_against_a_row_is_broadcast_and_is_not_added(self):
        monitor = heard(Given(), [(torch.randn(8, 1), torch.randn(8))], lambda p, b: ((p - b[1]) ** 2).mean())
        (pair,) = monitor.pairs.values()
        assert pair.broadcast
        assert (pair.prediction_shape, pair.target_shape) == ([8, 1], [8])
        assert "fvu" not in monitor.figures()

    @pytest.mark.parametrize(("a", "b"), [((8, 1), (8, 1)), ((8,), (8,)), ((8, 3), (1, 3)), ((8, 3), (3,))])
    def test_what_is_not(self, a, b):
        monitor = heard(Given(), [(torch.randn(a), torch.randn(b))], lambda p, batch: ((p - batch[1]) ** 2).mean())
        (pair,) = monitor.pairs.values()
        assert not pair.broadcast

    @pytest.mark.parametrize(
        "distance",
        [
            lambda a, b: (a[:, None] - b[None]).square().sum(-1),
            lambda a, b: (a.unsqueeze(1) - b.unsqueeze(0)).pow(2).sum(-1),
            lambda a, b: (a[:, None] - b[None]).norm(dim=-1),
            lambda a, b: (a[:, None] - b[None]).abs().sum(-1),
        ],
    )
    def test_distances_of_all_points_to_all_are_none(self, distance):
        a, b = torch.randn(9, 3), torch.randn(7, 3)

        def chamfer(p, batch):
            all_to_all = distance(p, batch[1])
            return all_to_all.amin(0).mean() + all_to_all.amin(1).mean()

        monitor = heard(Given(), [(a, b)], chamfer)
        (pair,) = monitor.pairs.values()
        assert not pair.broadcast
        assert "fvu" not in monitor.figures()


class TestLikeness:
    def reconstructs(self, target):
        x = torch.rand(64, 6)
        monitor = heard(Given(), [(x,)] * 2, lambda p, batch: functional.mse_loss(p, target(batch[0])))
        results = monitor.results()
        return monitor.reconstruction() is not None, int(results["mse_loss", "permuted"]) == 2

    def test_the_input_or_the_input_rescaled(self):
        assert self.reconstructs(lambda x: x) == (True, False)
        assert self.reconstructs(lambda x: 2 * x - 1) == (True, False)
        assert self.reconstructs(lambda x: x.clone()) == (True, False)

    def test_rows_in_another_order(self):
        assert self.reconstructs(lambda x: x.flip(0)) == (False, True)
        assert self.reconstructs(lambda x: x[torch.randperm(len(x))]) == (False, True)

    def test_other_numbers(self):
        assert self.reconstructs(lambda x: x.flip(1)) == (False, False)
        assert self.reconstructs(lambda x: x.square()) == (False, False)


class TestReach:
    def test_shares_outside_the_range_of_the_output(self):
        y = torch.randn(300, 4)
        found = figures(Given(), [(torch.randn(300, 4), y)], lambda p, b: functional.mse_loss(p.sigmoid(), b[1]))
        assert found["outside"] == pytest.approx(((y < 0) | (y > 1)).float().mean().item(), abs=2e-3)
        assert found["beyond"] == pytest.approx(((y < -0.05) | (y > 1.05)).float().mean().item(), abs=1e-6)
        assert found["below_zero"] == pytest.approx((y < 0).float().mean().item(), abs=2e-3)
        assert found["above_one"] == pytest.approx((y > 1).float().mean().item(), abs=2e-3)

    def test_outputs_that_are_zero_in_every_example(self):
        y_hat = torch.randn(300, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0]) - torch.tensor([0.0, 0.0, 1.0, 0.0])
        monitor = heard(
            Given(), [(y_hat, torch.rand(300, 4))], lambda p, b: functional.mse_loss(functional.relu(p), b[1])
        )
        assert monitor.stuck_outputs().tolist() == [2, 3]


def test_diagnose_gives_the_same_figures():
    x, y = torch.randn(128, 4), torch.randn(128, 2)
    network = nn.Linear(4, 2)
    report = ae.diagnose(network, split(x, y), lambda p, batch: functional.mse_loss(p, batch[1]))
    expected = 1 - r2_score(y.numpy(), network(x).detach().numpy(), multioutput="variance_weighted")
    assert report.output["fvu"] == pytest.approx(expected, rel=1e-4)
