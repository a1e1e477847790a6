"""Numbers of a model that change while it trains: weights of terms, temperatures, anything by its dotted path."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ae.callbacks.schedules.schedule import Schedule
from lightning_ae.checks import check_share, check_whole


class LinearSchedule(Schedule):
    r"""Changes a number of the model in a straight line: :math:`v(t) = a + (b - a)\,(t - t_0)/T`.

    :math:`t` is the optimizer's step; the value is :math:`a` before :math:`t_0` and :math:`b` from :math:`t_0 + T` on.
    It is set before the first batch of a step and depends on the step alone, so a resumed run goes on with it, whatever
    its checkpoint holds, and it is the same on all ranks and for all batches that accumulate into a step. Validation
    takes it as it is. It is logged as ``schedule/<attribute>``, and is in ``trainer.callback_metrics``. Fractions are
    of the run as its Trainer knows it: resumed with more epochs, the schedule is longer.

    The attribute is a number, an entry of a dict or list, or a buffer without dimensions; not a parameter, which the
    optimizer changes. Two things that go wrong in silence are warned of: a run that ends before the schedule does, and
    an attribute that nothing reads in the first steps of the schedule: ten at most, until one does (compiled code runs
    them eagerly). ``torch.compile`` compiles once more when the number first changes, and not again; told
    ``dynamic=False`` it compiles for each value, up to its limit, and so it does for numbers that are ``whole``.

    Args:
        attribute: dotted path in the model, as ``"code.beta"``, ``"loss.weights.ssim"``, ``"penalties.prior.weight"``
            or ``"level_weights.0"``; a ``"model."`` before it may be there.
        start: :math:`a`.
        end: :math:`b`.
        begin: :math:`t_0`: optimizer steps if an int (batches, with manual optimization), a fraction of the run if a
            float in [0, 1).
        duration: :math:`T`: optimizer steps if an int, a fraction of the run if a float in (0, 1]. So 1 is one step and
            1.0 the whole run.
        whole: round to whole numbers, for attributes that count.

    Raises:
        TypeError: for arguments of another type; at the start of a fit, if the attribute is no number or cannot be set.
        ValueError: for numbers out of range; at the start of a fit, if there is no such attribute or it is None, if
            two schedules have the same, or if a fraction is asked of a run whose length is unknown.

    Source: Bowman et al. 2016, https://arxiv.org/abs/1511.06349, for the weight of a KL.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning_ae import L1Code, SparseAutoencoder, TensorDataModule, mlp_pair
        >>> model = SparseAutoencoder(*mlp_pair(8, 4), code=L1Code(0.1))
        >>> trainer = L.Trainer(
        ...     accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False, callbacks=LinearSchedule("code.weight", 0.0, 1.0, duration=4),
        ... )
        >>> trainer.fit(model, TensorDataModule(torch.rand(40, 8), batch_size=8, val_fraction=0.0))
        >>> model.code.weight
        1.0
        >>> [LinearSchedule("code.weight", 0.0, 1.0, duration=4).value(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    def share(self, step: int, duration: int) -> float:
        """The share of the time."""
        return step / duration


class CosineSchedule(Schedule):
    r"""Changes a number of the model along half a cosine: :math:`v(t) = a + (b - a)\,(1 - \cos(\pi(t - t_0)/T))/2`.

    Slow at both ends. When, on what and how it is set is as for :class:`LinearSchedule`.

    Args:
        attribute: as for :class:`LinearSchedule`, and so are the others.
        start: :math:`a`.
        end: :math:`b`.
        begin: :math:`t_0`.
        duration: :math:`T`.
        whole: round to whole numbers.

    Raises:
        TypeError: as for :class:`LinearSchedule`.
        ValueError: as for :class:`LinearSchedule`.

    Source: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, for the learning rate.

    Example:
        >>> schedule = CosineSchedule("code.weight", 0.0, 2.0, duration=4)
        >>> [round(schedule.value(step), 4) for step in range(5)]
        [0.0, 0.2929, 1.0, 1.7071, 2.0]
    """

    def share(self, step: int, duration: int) -> float:
        """The part of the way that half a cosine has come."""
        return (1 - math.cos(math.pi * step / duration)) / 2


class CyclicalSchedule(Schedule):
    r"""Changes a number in ramps: :math:`v(t) = a + (b - a)\min(\tau/R, 1), \tau = (t \bmod \lceil T/M\rceil)M/T`.

    :math:`t` counts from the beginning, and the :math:`M` cycles share the duration :math:`T`. In each the value rises
    in a straight line over the share :math:`R` and then stays, so that a KL is charged in full and let go again: a
    latent that has collapsed gets another chance. When, on what and how it is set is as for :class:`LinearSchedule`.

    Args:
        attribute: as for :class:`LinearSchedule`, and so are those not named here.
        start: :math:`a`, where each cycle starts.
        end: :math:`b`, where it stays, and what is held after the last cycle.
        begin: when the first cycle begins.
        duration: :math:`T`, of all cycles together.
        cycles: :math:`M`.
        ramp: :math:`R` in (0, 1], the share of a cycle in which the value rises.
        whole: round to whole numbers.

    Raises:
        TypeError: as for :class:`LinearSchedule`.
        ValueError: as for :class:`LinearSchedule`, and for cycles or a ramp out of range.

    Source: Fu et al. 2019, https://arxiv.org/abs/1903.10145, equations 6 and 7.

    Example:
        >>> schedule = CyclicalSchedule("code.weight", 0.0, 1.0, duration=8, cycles=2)
        >>> [schedule.value(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        attribute: str,
        start: float,
        end: float,
        *,
        begin: int | float = 0,
        duration: int | float = 1.0,
        cycles: int = 4,
        ramp: float = 0.5,
        whole: bool = False,
    ) -> None:
        super().__init__(attribute, start, end, begin=begin, duration=duration, whole=whole)
        self.cycles = check_whole("cycles", cycles)
        self.ramp = check_share("ramp", ramp, "(]")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for the others; warn of cycles that are too short to rise."""
        super().on_train_start(trainer, pl_module)
        first, last = self.span(self._total)
        if last - first < 2 * self.cycles and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{self._name}: {self.cycles} cycles in {last - first} steps have no time to rise from {self.start:g}. "
                "Take fewer cycles, or a longer duration."
            )

    def share(self, step: int, duration: int) -> float:
        """That of the ramp in which the step is."""
        period = math.ceil(duration / self.cycles)
        return min((step % period) * self.cycles / duration / self.ramp, 1.0)
