"""A detector of outliers that are in its own training data: small autoencoders, trimmed, together."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_ae.checks import check_positive, check_seed, check_share, check_whole
from lightning_ae.data import TensorDataModule
from lightning_ae.models.mlp import MLPAutoencoder

#: Latents of the members, as shares of the columns, in turn.
_SHARES = (0.5, 0.8)
_BATCH_SIZE = 128


class OutlierDetector:
    r"""Ranks rows by how odd they are among the rows it was fitted to, outliers among which it need not be told of.

    A row is odd that does not obey what ties the columns of most others together: whose error of reconstruction
    :math:`e_m(x) = \|x - \hat x_m\|^2`, in standardised columns, is large. The score is how surprising that is,

    .. math:: -\ln P(b \ge b(x)), \qquad b(x) = \frac1M \sum_m \ln e_m(x),

    with the share :math:`P` of the rows fitted to, beyond the last of which it falls off exponentially, as the highest
    tenth does. It has no unit, and is the same for columns in any unit: 3 is what one row in twenty has.

    A long fit memorises outliers. Here each step leaves out the share ``trim`` of the batch that is reconstructed
    worst, so that they teach nothing; latents are bounded (:math:`\tanh`), so that what lies beyond the data is not
    extrapolated; and the fit is short, its rate falling to 0. How these were chosen, and on which tables it is better
    or worse than PyOD's detectors, is in `recipes/benchmarks/outliers.py`. A class that is scattered wider than its
    outliers, which then lie in its midst, is no case for it.

    Args:
        members: autoencoders, with latents of 0.5 and 0.8 of the columns in turn.
        hidden: units of their hidden layers.
        trim: share of each batch that is left out, in [0, 1): more than there are outliers.
        steps: of the optimizer.
        lr: learning rate of AdamW, at first.
        seed: of weights and batches; torch's own random state is left as it is.

    Shapes:
        rows ``(N, *event)``, flattened inside; scores ``(N,)``.

    Raises:
        ValueError: for numbers out of range; from :meth:`fit`, for fewer than 10 rows, or NaN and infinity in them.

    Source: trimming: Rousseeuw 1984, https://doi.org/10.1080/01621459.1984.10477105; reconstruction and ensembles:
    Chen et al. 2017, https://doi.org/10.1137/1.9781611974973.11.

    Example:
        >>> x = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 6)
        >>> x[7] = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9])  # each number is usual, together they are not
        >>> detector = OutlierDetector(steps=50).fit(x, accelerator="cpu")
        >>> int(detector.score(x).argmax())
        7
    """

    def __init__(
        self,
        members: int = 4,
        *,
        hidden: int = 64,
        trim: float = 0.3,
        steps: int = 200,
        lr: float = 3e-3,
        seed: int = 0,
    ) -> None:
        self.members = check_whole("members", members)
        self.hidden = check_whole("hidden", hidden)
        self.trim = check_share("trim", trim, "[)")
        self.steps = check_whole("steps", steps)
        self.lr = float(check_positive("lr", lr))
        self.seed = check_seed("seed", seed)
        self._shape: tuple[int, ...] | None = None

    def fit(self, x: Any, **trainer_options: Any) -> OutlierDetector:
        """Learn what is usual among these rows.

        Args:
            x: a tensor, NumPy array, DataFrame or sparse matrix ``(N, *event)``, outliers included.
            **trainer_options: for :class:`lightning.Trainer`, such as ``accelerator="cpu"``.

        Returns:
            Itself.
        """
        rows = _rows(x)
        if len(rows) < 10:
            raise ValueError(f"x: expected at least 10 rows, got {len(rows)}.")
        self._shape = tuple(rows.shape[1:])
        flat = rows.flatten(1)
        self.mean, scale = flat.mean(0), flat.std(0)
        self.scale = torch.where(scale > 1e-6 * flat.abs().amax(0).clamp(min=1e-30), scale, torch.ones_like(scale))
        flat = self._standardise(rows)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.ensemble = _Ensemble(flat.shape[1], self.members, self.hidden, self.trim, self.steps, self.lr)
            size = min(_BATCH_SIZE, len(flat))
            data = TensorDataModule(flat, batch_size=size, val_fraction=0, seed=self.seed, drop_last=True)
            quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            options = {"accelerator": "auto", "devices": 1, "enable_model_summary": False, **quiet, **trainer_options}
            L.Trainer(max_steps=self.steps, max_epochs=-1, **options).fit(self.ensemble, data.train_dataloader())
        self.ensemble.to("cpu").eval()
        with torch.no_grad():
            self._known = self._error(flat).sort().values
        return self

    @torch.no_grad()
    def score(self, x: Any) -> Tensor:
        """How odd rows are, ``(N,)``: the higher the odder; of rows fitted to and of others.

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        if self._shape is None:
            raise RuntimeError("OutlierDetector: fit it to rows first: OutlierDetector().fit(x).score(x).")
        rows = _rows(x)
        if tuple(rows.shape[1:]) != self._shape:
            raise ValueError(
                f"x: expected rows of shape {self._shape}, as it was fitted to, got {tuple(rows.shape[1:])}."
            )
        return _surprise(self._error(self._standardise(rows)), self._known)

    def _standardise(self, rows: Tensor) -> Tensor:
        return (rows.flatten(1) - self.mean) / self.scale

    def _error(self, flat: Tensor) -> Tensor:
        """Logarithm of the error of reconstruction, averaged over members."""
        errors = [
            torch.cat([(member.reconstruct(rows) - rows).square().sum(1) for rows in torch.split(flat, 4096)])
            for member in self.ensemble.each()
        ]
        return torch.stack(errors).clamp(min=torch.finfo(flat.dtype).tiny).log().mean(0)


class _Ensemble(L.LightningModule):
    """Autoencoders trained side by side on the same batches, each on what it reconstructs best."""

    def __init__(self, features: int, members: int, hidden: int, trim: float, steps: int, lr: float) -> None:
        super().__init__()
        self.trim, self.steps, self.lr = trim, steps, lr
        sizes = [max(1, round(_SHARES[index % len(_SHARES)] * features)) for index in range(members)]
        self.members = nn.ModuleList(
            MLPAutoencoder(features, size, hidden=(hidden,), latent_activation="tanh") for size in sizes
        )

    def each(self) -> list[MLPAutoencoder]:
        return list(self.members)  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        kept = max(1, math.floor((1 - self.trim) * len(batch)))
        losses = [member.loss(member(batch).params, batch) for member in self.each()]
        return torch.stack([loss.topk(kept, largest=False).values.mean() for loss in losses]).sum()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _rows(x: Any) -> Tensor:
    data = TensorDataModule(x, val_fraction=0, scale_bytes=False)
    batches = [batch if isinstance(batch, Tensor) else batch[0] for batch in data.predict_dataloader()]
    rows = torch.cat(batches).float()
    if not bool(rows.isfinite().all()):
        raise ValueError("x: expected finite numbers, got NaN or infinite ones; fill them in before.")
    return rows


def _surprise(values: Tensor, known: Tensor) -> Tensor:
    r""":math:`-\ln P(\ge v)` among sorted known values; exponential beyond them, by the excess of the highest tenth."""
    above = len(known) - torch.searchsorted(known, values.contiguous())
    tail = known[-max(2, len(known) // 10) :]
    rate = 1 / (tail - tail[0]).mean().clamp(min=1e-6)
    beyond = (values - known[-1]).clamp(min=0) * rate
    return math.log(len(known) + 1) - (above + 0.5).log() + beyond
