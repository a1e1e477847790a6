"""Who trains what, and with which decay."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_ae.codes import Code
from lightning_ae.losses import ReconstructionLoss
from lightning_ae.models.hyperparameters import RecordsArguments


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
        """Thresholds, gains and biases of the code, and scales of the loss: in units of the data, or logarithms."""
        return [*self.code.per_latent(), *(parameter for parameter in self.loss.parameters() if parameter.ndim < 2)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets: with weight decay :meth:`undecayed_parameters` in a group of their own, first."""
        parameters = self.trained_parameters()
        kept = {id(parameter) for parameter in self.undecayed_parameters()} if self.weight_decay else set()
        still, others = [p for p in parameters if id(p) in kept], [p for p in parameters if id(p) not in kept]
        groups: list[dict[str, Any]] = [{"params": still, "weight_decay": 0.0}, {"params": others}]
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
