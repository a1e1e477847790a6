r"""The main job: train an autoencoder on real digits, compare it with PCA, look at it, reload it.

A convolutional autoencoder with a Bernoulli likelihood learns scikit-learn's 8×8 digits (embedded, nothing is
downloaded). Afterwards its squared error on held-out digits stands beside that of PCA with a code of the same size,
the optimum of every *linear* autoencoder; inputs and reconstructions are drawn; and the checkpoint is loaded again and
must give the same reconstructions.

    python recipes/quickstart.py                # about a minute on two cores
    python recipes/quickstart.py --help
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import lightning as L
import matplotlib
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from torch import Tensor

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw and reload; returns the numbers of the table."""
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(args.seed)
    torch.set_num_threads(1)  # 8×8 images are too small for a second thread to help

    data = ae.DigitsDataModule(batch_size=64, seed=args.seed)
    model = ae.ConvAutoencoder(
        data.in_shape, args.latent_dim, channels=(32, 64), activation="gelu", loss=ae.BernoulliNLL(), lr=2e-3
    )
    best = ModelCheckpoint(out / "checkpoints", monitor="val/loss", filename="best", enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        logger=CSVLogger(out, name="log", version=""),
        callbacks=[best],
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    trainer.test(model, data, ckpt_path="best", verbose=False)
    nll = float(trainer.callback_metrics["test/reconstruction"])

    reloaded = ae.load(best.best_model_path).eval()
    train, test = whole(data.train_dataloader()), whole(data.test_dataloader())
    with torch.no_grad():
        reconstruction = reloaded.reconstruct(test)
        same = torch.equal(reconstruction, model.cpu().eval().reconstruct(test))
    if not same:
        raise RuntimeError("The reloaded checkpoint reconstructs differently.")

    pca = PCA(args.latent_dim).fit(train.flatten(1).numpy())
    by_pca = torch.from_numpy(pca.inverse_transform(pca.transform(test.flatten(1).numpy()))).view_as(test)
    numbers = {
        "squared_error": squared_error(reconstruction, test),
        "squared_error_pca": squared_error(by_pca, test),
        "nll_nats": nll,
        "seconds": seconds,
    }
    draw(test, reconstruction, by_pca, out / "quickstart.png")
    (out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    report(numbers, args.latent_dim, out, best.best_model_path)
    return numbers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--latent-dim", type=int, default=8, help="size of the code, the autoencoder's and PCA's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer")
    parser.add_argument("--out", default="outputs/quickstart", help="folder for checkpoint, picture, log and numbers")
    return parser.parse_args(argv)


def whole(loader) -> Tensor:
    """All images of a loader of ``(images, labels)``."""
    return torch.cat([x for x, _ in loader])


def squared_error(x_hat: Tensor, x: Tensor) -> float:
    """Mean over images of the squared error summed over pixels."""
    return float((x_hat - x).square().flatten(1).sum(1).mean())


def draw(x: Tensor, by_model: Tensor, by_pca: Tensor, path: Path, columns: int = 12) -> None:
    """Inputs above the two reconstructions."""
    rows = [("input", x), ("autoencoder", by_model), ("PCA", by_pca)]
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns * 0.8, 2.9), layout="constrained")
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.suptitle("Held-out digits and their reconstructions")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(numbers: dict[str, float], latent_dim: int, out: Path, checkpoint: str) -> None:
    """The table at the end."""
    table = Table(title=f"Held-out digits, code of {latent_dim} numbers")
    table.add_column("")
    table.add_column("squared error per image", justify="right")
    table.add_column("nats per image", justify="right")
    table.add_row("PCA (best linear autoencoder)", f"{numbers['squared_error_pca']:.3f}", "")
    table.add_row("ConvAutoencoder, BernoulliNLL", f"{numbers['squared_error']:.3f}", f"{numbers['nll_nats']:.2f}")
    console = Console()
    console.print(table)
    console.print(f"trained in {numbers['seconds']:.0f} s; picture: {out / 'quickstart.png'}")
    console.print(f"checkpoint, reloaded and checked: {checkpoint}")


if __name__ == "__main__":
    main()
