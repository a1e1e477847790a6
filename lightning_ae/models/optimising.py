"""Who trains what, and with which decay."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_ae.codes import Code
from lightning_ae.losses import Likelihood, ReconstructionLoss
from lightning_ae.models.hyperparameters import RecordsArguments

#: Of scales that likelihoods learn, in learning rates of the model; and the most of it where that is more than theirs.
SCALE_RATE, SCALE_MOST = 10.0, 0.02


class TrainsWithAdamW(RecordsArguments):
    """A LightningModule whose weights decay, but for numbers to which 0 is no simpler than any other."""

    code: Code
    loss: ReconstructionLoss
    lr: float
    weight_decay: float

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with ``lr`` and ``weight_decay``; LightningCLI replaces it if given ``--optimizer``.

        It gets :meth:`parameter_groups`, and is fused (one pass over all weights in each step, a large part of a small
        network's step) unless gradients are scaled, or clipped in mixed precision, which Lightning refuses then.
        """
        groups, lr, decay = self.parameter_groups(), float(self.lr), float(self.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=self._can_fuse())

    def _can_fuse(self) -> bool:
        trainer, hook = self._trainer, "configure_gradient_clipping"
        precision = "" if trainer is None else str(trainer.precision)
        own = getattr(type(self), hook) is not getattr(L.LightningModule, hook)
        clipped = trainer is not None and (own or bool(trainer.gradient_clip_val))
        if precision == "16-mixed" or (precision.endswith("-mixed") and clipped):
            return False
        return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in self.parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those that ask for gradients when the fit begins; others can get a group and a rate of their own later.

        Raises:
            ValueError: if all are frozen.
        """
        chosen = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not chosen:
            raise ValueError(f"{type(self).__name__}: all parameters are frozen (requires_grad=False); none can train.")
        return chosen

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Thresholds, gains and biases of the code, in units of the data or logarithms of them."""
        return self.code.per_latent()

    def parameter_groups(self) -> list[dict[str, Any]]:
        r"""What the optimizer gets.

        With weight decay :meth:`undecayed_parameters` are a group of their own, first. So are scales that likelihoods
        learn, :math:`\ln\sigma` or :math:`\ln\theta`, always: they do not decay, and learn ten times as fast, to
        0.02 at most. A step of Adam moves a parameter by about ``lr``, little for a logarithm: an error of 0.14 is
        2,000 steps of 0.001 from :math:`\sigma = 1`. Held-out nats of a 784-128-16-128-784 VAE on MNIST after 300
        and 1,200 batches are -321 and -384, at one rate for all 521 and -72 (`recipes/benchmarks/defaults.py`).
        """
        parameters = self.trained_parameters()
        likelihoods = (part for part in self.modules() if isinstance(part, Likelihood))
        scales = {id(p) for part in likelihoods for p in part.parameters(recurse=False)}
        still = {id(p) for p in self.undecayed_parameters()} - scales if self.weight_decay else set()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) in still], "weight_decay": 0.0},
            {
                "params": [p for p in parameters if id(p) in scales],
                "weight_decay": 0.0,
                "lr": max(float(self.lr), min(SCALE_RATE * float(self.lr), SCALE_MOST)),
            },
            {"params": [p for p in parameters if id(p) not in still | scales]},
        ]
        return [group for group in groups if group["params"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read checkpoints from when more parameters were in one group."""
        super().on_load_checkpoint(checkpoint)
        made_by = getattr(self.configure_optimizers, "__func__", None)
        trains = any(p.requires_grad for p in self.parameters())
        if trains and getattr(made_by, "__module__", "").startswith(f"{__package__}."):
            for state in checkpoint.get("optimizer_states", ()):
                self._regroup(state)

    def _regroup(self, state: dict[str, Any]) -> None:
        parameters, groups, before = self.trained_parameters(), self.parameter_groups(), state["param_groups"]
        sizes = [len(group["params"]) for group in before]
        # all in one, or of a dictionary the first, its pre-bias, in one of its own: either way in their order
        if sizes == [len(group["params"]) for group in groups] or sizes not in (
            [len(parameters)],
            [1, len(parameters) - 1],
        ):
            return
        flat = [(number, group) for group in before for number in group["params"]]
        held = dict(zip(map(id, parameters), flat, strict=True))
        state["param_groups"] = [
            {
                **held[id(group["params"][0])][1],
                "params": [held[id(p)][0] for p in group["params"]],
                **({"weight_decay": 0.0} if "weight_decay" in group else {}),
            }
            for group in groups
        ]
