"""Pictures of reconstructions while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional
from torchvision.utils import make_grid, save_image

from lightning_ae.checks import check_finite, check_flag, check_sequence, check_type, check_whole
from lightning_ae.diagnostics.watch.batch import first_tensor

_SMALLEST = 48  # pixels; smaller images are drawn larger, by whole factors


class ReconstructionImages(L.Callback):
    r"""Draws validation examples over their reconstructions :math:`\hat x`, one column for each example.

    The rows are :math:`x`; :math:`\hat x`, which is ``model.reconstruct(x)``; for a model with a method ``stages(x)``,
    which gives reconstructions from coarse to full, one for each before the full one; and, if asked for,
    ``model.sample(num)`` of a generative model, with the same random numbers each time, so that one sees a sample
    change.

    Pictures go as ``reconstructions`` to the loggers that take them (TensorBoard, Weights & Biases) and, if none does
    or a folder is given, to ``reconstructions-<step>.png`` there. Values are drawn from black at the low end of the
    range to white at the high end and cut off beyond. Training does not notice: weights are the same, bit by bit, with
    and without it. It draws on one process, and so not for models that are sharded over several.

    Args:
        num: how many examples, the first ones of the first validation loader.
        every_n_epochs: draw after every so many validations, the first among them. (``trainer.validate`` always draws.)
        samples: add a row of samples.
        shape: how to view an example as an image, ``(H, W)`` or ``(C, H, W)``, where the data are flat.
        value_range: what black and white are; None for the range of the model's loss if it is bounded, else [0, 1] if
            the examples lie in it, else that of the examples.
        folder: where to write PNG files; None for ``images`` in the log folder, if no logger takes pictures.

    Shapes:
        ``x``: ``(B, C, H, W)`` with one or three channels, or ``(B, H, W)``. A warning says that others are not drawn.

    Raises:
        TypeError: at the start, if the model has no ``reconstruct``, or no ``sample`` and samples are asked for.
        ValueError: for numbers, a shape or a range that make no sense.

    Example:
        >>> import tempfile
        >>> from lightning_ae import ConvAutoencoder, DigitsDataModule
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = L.Trainer(
        ...         accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        ...         callbacks=ReconstructionImages(num=4, folder=folder),
        ...     )
        ...     _ = trainer.validate(ConvAutoencoder((1, 8, 8), 4), DigitsDataModule(), verbose=False)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['reconstructions-0.png']
    """

    def __init__(
        self,
        num: int = 8,
        every_n_epochs: int = 1,
        samples: bool = False,
        shape: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.num = check_whole("num", num)
        self.every_n_epochs = check_whole("every_n_epochs", every_n_epochs)
        self.samples = check_flag("samples", samples)
        self.shape = None if shape is None else tuple(_numbers("shape", shape, check_whole))
        if self.shape is not None and len(self.shape) not in (2, 3):
            raise ValueError(f"shape: expected (H, W) or (C, H, W), got {shape!r}.")
        self.value_range: tuple[float, float] | None = None
        if value_range is not None:
            ends = _numbers("value_range", value_range, check_finite)
            if len(ends) != 2 or not ends[0] < ends[1]:
                raise ValueError(f"value_range: expected (low, high) with low < high, got {value_range}.")
            self.value_range = (ends[0], ends[1])
        check_type("folder", folder, str, Path, None)
        self.folder = None if folder is None else Path(folder)
        self._validations = 0
        self._examples: list[Tensor] | None = None
        self._log_folder = Path()

    @property
    def state_key(self) -> str:
        """Two of them may draw into different folders."""
        folder = None if self.folder is None else str(self.folder)
        return self._generate_state_key(num=self.num, every_n_epochs=self.every_n_epochs, folder=folder)

    def state_dict(self) -> dict[str, Any]:
        """How often was validated."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._validations = state_dict["validations"]

    # -- Lightning --------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See that the model can do what is asked of it."""
        for name in ("reconstruct", *(["sample"] if self.samples else [])):
            if stage in ("fit", "validate") and not callable(getattr(pl_module, name, None)):
                raise TypeError(f"ReconstructionImages: {type(pl_module).__name__} has no method {name!r}.")
        if trainer.world_size > 1 and isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            rank_zero_warn("ReconstructionImages: draws nothing of a model that is sharded over processes.")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to collect examples, if it is time to."""
        self._examples = None
        if trainer.sanity_checking:
            return
        due = trainer.state.fn != "fit" or self._validations % self.every_n_epochs == 0
        if trainer.state.fn == "fit":
            self._validations += 1
        if not due:
            return
        # on all processes, which agree on it
        self._log_folder = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "images"
        sharded = trainer.world_size > 1 and isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        if trainer.is_global_zero and not sharded:
            self._examples = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first examples."""
        if self._examples is None or dataloader_idx > 0:
            return
        there = sum(len(x) for x in self._examples)
        if there < self.num:
            get_input: Any = getattr(pl_module, "get_input", first_tensor)
            x = get_input(batch)
            if x is not None and x.ndim > 0:
                self._examples.append(x[: self.num - there].detach().clone())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw them."""
        examples, self._examples = self._examples, None
        if not examples:
            return
        x = torch.cat(examples)
        image = self._as_image(tuple(x.shape[1:]))
        if image is None:
            rank_zero_warn(
                f"ReconstructionImages: draws images of one or three channels, (C, H, W) or (H, W), not examples of "
                f"shape {tuple(x.shape[1:])}. If they are flattened images, say of which shape."
            )
            return
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.precision_plugin.val_step_context():
            rows = self._rows(pl_module, x)
        self._emit(trainer, self._grid([row.float().reshape(-1, *image) for row in rows], pl_module))

    # -- drawing ----------------------------------------------------------------------------------------------

    def _as_image(self, event: tuple[int, ...]) -> tuple[int, ...] | None:
        """The event as (C, H, W); None if it is no image."""
        image = event if self.shape is None else self.shape
        image = (1, *image) if len(image) == 2 else image
        fits = len(image) == 3 and image[0] in (1, 3) and math.prod(image) == math.prod(event)
        return image if fits else None

    def _rows(self, model: Any, x: Tensor) -> list[Tensor]:
        rows = [x, model.reconstruct(x)]
        if callable(getattr(model, "stages", None)):
            stages = list(model.stages(x))
            rows += stages[:-1]  # the last is the full reconstruction
        if self.samples:
            torch.manual_seed(0)
            rows.append(model.sample(self.num))
        return rows

    def _grid(self, rows: list[Tensor], model: Any) -> Tensor:
        low, high = self._range(rows[0], model)
        columns = len(rows[0])
        drawn = torch.cat([row[:columns] for row in rows]).nan_to_num(low)
        drawn = ((drawn - low) / (high - low)).clamp(0, 1)
        factor = math.ceil(_SMALLEST / max(drawn.shape[-2:]))
        if factor > 1:
            drawn = functional.interpolate(drawn, scale_factor=factor, mode="nearest")
        grid: Tensor = make_grid(drawn.cpu(), nrow=columns, padding=2, pad_value=0.5)
        return grid

    def _range(self, x: Tensor, model: Any) -> tuple[float, float]:
        if self.value_range is not None:
            return self.value_range
        low, high = getattr(getattr(model, "loss", None), "output_range", (-math.inf, math.inf))
        if math.isfinite(high - low):
            return low, high
        low, high = float(x.min()), float(x.max())
        return (0.0, 1.0) if (low >= 0 and high <= 1) or not low < high else (low, high)

    def _emit(self, trainer: L.Trainer, grid: Tensor) -> None:
        step, taken = trainer.global_step, False
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image("reconstructions", grid, step)
            elif hasattr(logger, "log_image"):
                # arrays (H, W, C) of bytes mean the same to all versions of Weights & Biases
                array = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
                logger.log_image("reconstructions", [array], step=step)
            else:
                continue
            taken = True
        if self.folder is not None or not taken:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            save_image(grid, self._log_folder / f"reconstructions-{step}.png")


def _numbers(name: str, values: Sequence[Any], check: Callable[[str, Any], Any]) -> list[Any]:
    return [check(name, value) for value in check_sequence(name, values)]
