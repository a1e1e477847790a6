"""The treatment of a model on the command line: remedies tried, and written where ``lightning-ae fit`` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import yaml

from lightning_ae.cli.failing import INTERRUPTED, Failure, failed
from lightning_ae.cli.making import DoctorCLI
from lightning_ae.diagnostics import Treatment, treat
from lightning_ae.diagnostics.remedies import Remedy, Together, TrainLonger
from lightning_ae.diagnostics.remedies.base import merge


def treatment(cli: DoctorCLI) -> tuple[Treatment, str]:
    """Try remedies, and write ``treatment.yaml`` and ``treated.ckpt`` if some help.

    Returns:
        What was tried, and why there is no ``treatment.yaml`` for what helped, if so.

    Raises:
        Failure: if there are no held-out data, or the fits fail.
    """
    cli.make_all()
    options = {name: value for name, value in cli.trainer_options.items() if name != "default_root_dir"}
    data = cli.datamodule
    if data is None:
        data = (cli.model.train_dataloader(), cli.model.val_dataloader())
    seed = cli.config.seed_everything
    try:
        treated = treat(
            cli.make_model,
            data,
            trials=cli.config.trials,
            steps=cli.config.steps,
            seed=seed if isinstance(seed, int) else 0,
            latent=cli.latent.latent,
            trainer_options=options,
        )
    except ValueError as error:
        if str(error).startswith("data: "):
            raise Failure(f"--treat: {error}") from error
        raise failed("The treatment failed", error) from error
    except (SystemExit, KeyboardInterrupt) as error:  # by the former Lightning leaves when Ctrl-C has ended a fit
        raise Failure("Interrupted in the treatment; the diagnosis stands.", code=INTERRUPTED) from error
    except Exception as error:
        raise failed("The treatment failed", error) from error
    why = ""
    if treated.improved:
        cli.folder.mkdir(parents=True, exist_ok=True)
        save(treated.model, cli.folder / "treated.ckpt")
        try:
            config = with_remedies(cli.configuration(), treated.remedies)
            text = yaml.safe_dump(config, sort_keys=False)
            (cli.folder / "treatment.yaml").write_text(text, encoding="utf-8")
        except ValueError as error:  # a model with parts that no configuration can say
            why = str(error)
    return treated, why


def with_remedies(config: dict[str, Any], remedies: list[Remedy]) -> dict[str, Any]:
    """The whole configuration of a run with remedies in it, after the callbacks that it has.

    It is the whole, since LightningCLI puts a list of callbacks from one file in the place of another's.

    Args:
        config: of the run.
        remedies: to be applied in it.

    Returns:
        A new configuration.

    Example:
        >>> from lightning_ae.diagnostics.remedies import ClipGradients
        >>> with_remedies({"trainer": {"callbacks": None, "max_epochs": 3}}, [ClipGradients(), TrainLonger(2)])
        {'trainer': {'callbacks': [], 'max_epochs': 6, 'gradient_clip_val': 1.0}}
    """
    trainer = dict(config.get("trainer") or {})
    there = trainer.get("callbacks") or []
    trainer["callbacks"] = there if isinstance(there, list) else [there]
    for remedy in _single(remedies):
        if isinstance(remedy, TrainLonger):
            for name in ("max_steps", "max_epochs"):
                if (trainer.get(name) or -1) > 0:
                    trainer[name] *= remedy.factor
    return merge([{**config, "trainer": trainer}, *(remedy.config() for remedy in remedies)])


def _single(remedies: list[Remedy]) -> list[Remedy]:
    return [
        single
        for remedy in remedies
        for single in (_single(list(remedy.remedies)) if isinstance(remedy, Together) else [remedy])
    ]


def save(model: L.LightningModule, path: Path) -> None:
    """Write a checkpoint of a model that no Trainer holds any more."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.cpu()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
