r"""Why does this network not learn? Diagnostics on an autoencoder that is not ours.

A plain LightningModule, as one finds it in a tutorial, with three mistakes: images scaled to [0, 255] under a sigmoid,
squared error through it, and biases and a learning rate that leave half of the first layer dead. `DiagnosticsReport` is
attached to its Trainer, and nothing else is changed; its findings name the mistakes. Then their advice is followed, one
after another, and the network is trained again until nothing is found. `ae.diagnose` gives the same in one call,
without a Trainer.

    python recipes/diagnose_any_module.py                        # digits; half a minute on two cores
    python recipes/diagnose_any_module.py --root ../shared/data  # MNIST from a local folder
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path

import lightning as L
import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class SomebodysAutoencoder(L.LightningModule):
    """Nothing of this package in it; each argument mends one mistake."""

    def __init__(self, shape, scale: float = 255.0, bias: float = -30.0, bernoulli: bool = False, leaky: bool = False):
        super().__init__()
        size = math.prod(shape)
        relu = nn.LeakyReLU if leaky else nn.ReLU
        self.scale, self.bernoulli = scale, bernoulli
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, 64), relu(), nn.Linear(64, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 64), relu(), nn.Linear(64, size), nn.Unflatten(1, shape))
        nn.init.constant_(self.encoder[1].bias[:32], bias * scale)

    def training_step(self, batch, batch_idx):
        """Mean squared error through a sigmoid, or binary cross-entropy on logits."""
        x = batch[0] * self.scale
        a = self.decoder(self.encoder(x))
        if self.bernoulli:
            return functional.binary_cross_entropy_with_logits(a, x)
        return functional.mse_loss(torch.sigmoid(a), x)

    validation_step = training_step

    def reconstruct(self, x: Tensor) -> Tensor:
        """In the units of the data that it is given."""
        return torch.sigmoid(self.decoder(self.encoder(x * self.scale))) / self.scale

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, report, mend, and train again; returns the numbers of each attempt."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = ae.DigitsDataModule(seed=args.seed, val_fraction=0.0)
    if args.root is not None:
        data = ae.VisionDataModule("MNIST", root=args.root, seed=args.seed, val_fraction=0.0)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    x = torch.cat([batch[0] for batch in data.test_dataloader()])[:512]

    attempts = {
        "as found": {},
        "data in [0, 1]": {"scale": 1.0},
        "and cross-entropy": {"scale": 1.0, "bernoulli": True},
        "and biases of 0": {"scale": 1.0, "bernoulli": True, "bias": 0.0},
        "and LeakyReLU": {"scale": 1.0, "bernoulli": True, "bias": 0.0, "leaky": True},
    }
    numbers, images = {}, {}
    for name, mended in attempts.items():
        L.seed_everything(args.seed, verbose=False)
        model = SomebodysAutoencoder(data.in_shape, **mended)
        folder = args.out / name.replace(" ", "_").replace(",", "")
        diagnostics = ae.DiagnosticsReport(latent="encoder", every_n_steps=2, folder=folder, quiet=True)
        trainer = L.Trainer(
            max_epochs=args.epochs,
            accelerator=args.accelerator,
            callbacks=diagnostics,
            log_every_n_steps=10,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        with torch.no_grad():
            images[name] = model.cpu().eval().reconstruct(x)
        serious = [finding for finding in diagnostics.findings if finding.severity != "info"]
        error = float((images[name] - x).square().flatten(1).sum(1).mean())
        errors = sum(finding.severity == "error" for finding in serious)
        numbers[name] = {"error": error, "findings": len(serious), "errors": errors}
        print(f"\n{name}: squared error {error:.3f} per held-out image, {len(serious)} findings")
        print("\n".join(f"  {finding}" for finding in serious))

    report = ae.diagnose(model, data.train_dataloader(), latent="encoder")
    print(f"\nae.diagnose on the last model:\n{report}")
    draw(x, images, numbers, args.out / "diagnose_any_module.png")
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with MNIST; without it, scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/diagnose_any_module"), help="output folder")
    return parser.parse_args(argv)


def draw(x: Tensor, images: dict[str, Tensor], numbers: dict[str, dict[str, float]], path: Path) -> None:
    """A row of reconstructions for each attempt."""
    rows = {"input": x, **images}
    figure, axes = plt.subplots(len(rows), 10, figsize=(12, 1.2 * len(rows)), layout="constrained")
    for line, (name, batch) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, batch, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        n = numbers.get(name)
        label = name if n is None else f"{name}\nerror {n['error']:.2f}, {n['findings']} findings"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle("Somebody's autoencoder, and what the findings made of it: held-out reconstructions")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
