r"""Outliers among one's own data in three lines: digits that are not what they are filed under.

scikit-learn's 8×8 images of one digit, with others mixed in and not marked (embedded, nothing is downloaded). The three
lines are

    detector = ae.OutlierDetector()
    detector.fit(x)
    scores = detector.score(x)

The recipe prints the area under the ROC curve, which the labels are for, beside that of an autoencoder that is trained
without precautions, at several lengths: the longer, the better it knows the outliers, too. `outliers.png` has the
images in the order of the score.

    python recipes/outliers.py                 # about ten seconds
    python recipes/outliers.py --digit 4 --share 0.2
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning as L
import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fit, score, compare and draw; returns areas under the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digit", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.1, help="of others, for each image of the digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs="*", default=[10, 100, 400], help="of the plain autoencoder")
    parser.add_argument("--out", type=Path, default=Path("outputs/outliers"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")

    x, odd = contaminated(args.digit, args.share, args.seed)
    detector = ae.OutlierDetector(seed=args.seed)
    detector.fit(x, accelerator="cpu")
    scores = detector.score(x)

    numbers = {"detector": roc_auc_score(odd, scores)}
    for epochs in args.epochs:
        numbers[f"plain_{epochs}"] = roc_auc_score(odd, plain(x, epochs, args.seed))
    for name, auroc in numbers.items():
        print(f"{name.replace('plain_', 'plain autoencoder, epochs: '):32}AUROC {auroc:.3f}")
    draw(x, odd, scores, args.out / "outliers.png")
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    return numbers


def contaminated(digit: int, share: float, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images of one digit with others among them, in [0, 1], and which are the others."""
    data, rng = load_digits(), np.random.default_rng(seed)
    own, others = np.flatnonzero(data.target == digit), np.flatnonzero(data.target != digit)
    rows = rng.permutation(np.concatenate([own, rng.choice(others, max(1, round(share * len(own))), replace=False)]))
    return torch.tensor(data.data[rows] / 16, dtype=torch.float32), data.target[rows] != digit


def plain(x: torch.Tensor, epochs: int, seed: int) -> torch.Tensor:
    """Scores of an autoencoder that is trained on all of the rows."""
    L.seed_everything(seed, verbose=False)
    model = ae.MLPAutoencoder(x.shape[1], 16, hidden=(64,))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, enable_model_summary=False, **options)
    data = ae.TensorDataModule(x, batch_size=32, val_fraction=0)
    trainer.fit(model, data)
    return torch.cat([batch["score"] for batch in trainer.predict(model, data)])


def draw(x: torch.Tensor, odd: np.ndarray, scores: torch.Tensor, path: Path, columns: int = 12) -> None:
    """The images of the highest and of the lowest scores; outliers have a red frame."""
    order = scores.argsort(descending=True).tolist()
    figure, axes = plt.subplots(4, columns, figsize=(columns * 0.8, 3.6), layout="constrained")
    for axis, row in zip(axes.flat, order[: 3 * columns] + order[-columns:], strict=True):
        axis.imshow(x[row].view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color="tab:red" if odd[row] else "0.8", linewidth=2 if odd[row] else 0.5)
    axes[0, 0].set_ylabel("oddest")
    axes[3, 0].set_ylabel("least odd")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
