"""Distributions for loggers that can draw them, and quantiles for those that cannot."""

from __future__ import annotations

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

QUANTILES = (0.05, 0.5, 0.95)


@rank_zero_only
def log_histogram(logger: Logger, name: str, values: Tensor, step: int) -> None:
    """Send a distribution to a logger.

    Args:
        logger: TensorBoard's and Weights & Biases' get a histogram, others the quantiles 5, 50 and 95 %.
        name: what it is called there.
        values: the numbers, on the host, any shape; those that are not finite are left out.
        step: the logger's step.
    """
    values = values.flatten().double()
    values = values[values.isfinite()]
    if len(values) == 0:
        return
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(name, values.numpy(), global_step=step)
    elif isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.log({name: wandb.Histogram(values.tolist()), "trainer/global_step": step})
    else:
        quantiles = values.quantile(values.new_tensor(QUANTILES)).tolist()
        logger.log_metrics(
            {f"{name}/p{100 * q:.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}, step=step
        )
