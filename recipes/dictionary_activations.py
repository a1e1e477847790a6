r"""A dictionary of what a network has learned: activations of a classifier of digits, taken apart by TopK.

A small convolutional network learns scikit-learn's digits. What its second layer puts out, one vector of channels for
each place of each image, is collected into shards on disk, and a TopK dictionary is trained on them. How good it is
shows in three ways:

* variance: the fraction left unexplained, beside that of as many principal components as latents are on;
* the network itself: its loss on test images with each vector replaced by its reconstruction, as the share of what
  silencing the layer costs, :math:`(L_\text{ablate} - L_\text{splice})/(L_\text{ablate} - L_\text{clean})`;
* pictures: the pieces of images that each latent answers to most.

    python recipes/dictionary_activations.py      # half a minute on two cores

Source: Bricken et al. 2023, https://transformer-circuits.pub/2023/monosemantic-features; Gao et al. 2024,
https://arxiv.org/abs/2406.04093.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import lightning as L
import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import lightning_ae as ae
from lightning_ae.metrics import dead_fraction, decoder_overlap, log10_density

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LAYER = "3"  # the second ReLU; each of its places sees 5×5 pixels
SIDE, FIELD = 8, 5


class Images(NamedTuple):
    """Digits ``(N, 1, 8, 8)`` and what they are ``(N,)``."""

    x: Tensor
    y: Tensor


def digits(seed: int) -> tuple[Images, Images]:
    """Training and test images."""
    data = ae.DigitsDataModule(batch_size=10_000, val_fraction=0.0, seed=seed)
    ((x, y),) = data.train_dataloader()
    ((test_x, test_y),) = data.test_dataloader()
    return Images(x, y), Images(test_x, test_y)


def classifier(images: Images, width: int, epochs: int) -> nn.Sequential:
    """Train a small network; images are shifted by up to a pixel."""
    network = nn.Sequential(
        nn.Conv2d(1, width // 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(width * (SIDE // 2) ** 2, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images.x)).split(64):
            i, j = torch.randint(3, (2,)).tolist()
            x = pad(images.x[rows], (1, 1, 1, 1))[..., i : i + SIDE, j : j + SIDE]
            optimizer.zero_grad()
            cross_entropy(network(x), images.y[rows]).backward()
            optimizer.step()
    return network


def train(data: ae.ActivationDataModule, args: argparse.Namespace) -> ae.DictionaryAutoencoder:
    """A TopK dictionary of the activations."""
    L.seed_everything(args.seed, verbose=False)
    (channels,) = data.in_shape
    model = ae.DictionaryAutoencoder(
        channels, args.latents, ae.TopKCode(args.k), lr=args.lr, dead_after=data.num_train_examples // 2
    )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    return model.eval().cpu()


@torch.no_grad()
def measure(
    model: ae.DictionaryAutoencoder, network: nn.Module, rows: Tensor, mean: Tensor, test: Images
) -> tuple[dict[str, float], Tensor]:
    """Numbers on activations of test images, and how often each latent is on."""
    fvu, shrinkage = ae.FractionVarianceUnexplained(), ae.Shrinkage()
    density = ae.FeatureDensity(model.encoder.num_latents)
    for x in rows.split(4096):
        z = model.encode(x)
        density.update(z)
        fvu.update(x_hat := model.decode(z), x)
        shrinkage.update(x_hat, x)
    frequency = density.compute()
    # from the counts: a sum of rounded frequencies may exceed the most latents that any place has
    l0 = int(density.fired.sum()) / int(density.count)
    numbers = {"fvu": fvu.compute().item(), "l0": l0, "dead": dead_fraction(frequency).item()}
    numbers |= {name: value.item() for name, value in shrinkage.compute().items()}
    numbers["overlap"] = decoder_overlap(model.decoder.weight).median().item()

    def loss(logits: Tensor, batch: Images) -> Tensor:
        return cross_entropy(logits, batch[1], reduction="none")

    for ablate, name in (("zero", "zero"), (mean, "mean")):
        found = ae.loss_recovered(
            network, LAYER, model.reconstruct, [(test.x, test.y)], loss, ablate=ablate, feature_dim=1
        )
        numbers |= {f"recovered_{name}": found.recovered, f"loss_{name}": found.ablate}
    numbers |= {"loss_clean": found.clean, "loss_splice": found.splice}
    return numbers, frequency


@torch.no_grad()
def principal_components(shards: ae.ActivationShards, rows: Tensor, k: int) -> float:
    """The variance that k principal components of the training data leave unexplained."""
    x = shards.rows(torch.arange(len(shards))).float()
    _, vectors = torch.linalg.eigh(torch.cov(x.T))
    basis = vectors[:, -k:]
    metric = ae.FractionVarianceUnexplained()
    metric.update((rows - shards.mean) @ basis @ basis.T + shards.mean, rows)
    return metric.compute().item()


class Answer(NamedTuple):
    """Where a latent is largest: images, places in them, and digits."""

    latent: int
    value: float
    patches: Tensor
    digits: list[int]


@torch.no_grad()
def answers(
    model: ae.DictionaryAutoencoder, shards: ae.ActivationShards, images: Images, number: int, best: int
) -> list[Answer]:
    """For latents of all densities, the pieces of images to which each answers most, one of an image."""
    z = model.encode(shards.rows(torch.arange(len(shards))).float()).to_dense()
    often = (z > 0).sum(0)
    used = (often >= 4 * best).nonzero().flatten()
    used = used[often[used].argsort(descending=True)]
    chosen = used[torch.linspace(0, len(used) - 1, min(number, len(used))).long()]
    padded = pad(images.x[:, 0], (FIELD // 2,) * 4)
    found = []
    for latent in chosen.tolist():
        value, row = z[:, latent].sort(descending=True)
        places, seen = [], set()
        for example, i, j in shards.index(row[:2000]).tolist():
            if example not in seen and len(places) < best:
                seen.add(example)
                places.append((example, i, j))
        patches = torch.stack([padded[e, i : i + FIELD, j : j + FIELD] for e, i, j in places])
        found.append(Answer(latent, value[0].item(), patches, [int(images.y[e]) for e, _, _ in places]))
    return found


def draw(path: Path, found: list[Answer], frequency: Tensor, numbers: dict[str, float], k: int) -> None:
    """What latents answer to; how often they do; what the network loses."""
    figure = plt.figure(figsize=(15, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))
    rows, columns = -(-len(found) // 2), 2
    best = max(len(answer.patches) for answer in found)
    left.suptitle(f"The {FIELD}×{FIELD} pixels to which a latent answers most (often on at the top left)")
    grid = left.subplots(rows, columns, squeeze=False)
    for axis, answer in zip(grid.T.flat, found, strict=False):
        gap = torch.full((FIELD, 1), float("nan"))
        strip = torch.cat([part for patch in answer.patches for part in (patch, gap)], dim=1)
        axis.set_facecolor("#cfd8e3")  # between the patches
        axis.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(f"latent {answer.latent}, on in {100 * frequency[answer.latent]:.1f} % of places", fontsize=8)
        axis.set_xticks([FIELD / 2 - 0.5 + (FIELD + 1) * i for i in range(len(answer.patches))], answer.digits)
        axis.tick_params(length=0, labelsize=7)
        axis.set_yticks([])
        axis.set_xlim(-0.5, (FIELD + 1) * best - 1.5)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for axis in list(grid.T.flat)[len(found) :]:
        axis.axis("off")
    density, variance, loss = right.subplots(3, 1)
    alive = frequency[frequency > 0]
    density.hist(log10_density(alive).numpy(), bins=30, color="C0")
    density.set(title="Feature density (latents that fire)", xlabel="log₁₀ of the share of places", ylabel="latents")
    names = [f"TopK dictionary, k = {k}", f"{k} principal components"]
    bars = variance.barh(names, [numbers["fvu"], numbers["fvu_pca"]], color=["C0", "0.6"])
    variance.bar_label(bars, fmt="%.3f", padding=3)
    variance.set(title="Variance of test activations left unexplained", xlim=(0, 1.2 * numbers["fvu_pca"]))
    variance.invert_yaxis()
    values = [numbers[f"loss_{name}"] for name in ("clean", "splice", "mean", "zero")]
    bars = loss.barh(
        ["as it is", "spliced", "layer at its mean", "layer at zero"], values, color=["C2", "C0", "0.6", "0.6"]
    )
    loss.bar_label(bars, fmt="%.3f", padding=3)
    loss.set(
        title=f"{100 * numbers['recovered_mean']:.1f} % of the classifier's loss recovered",
        xlabel="cross-entropy on test images (nats)",
        xlim=(0, 1.2 * max(values)),
    )
    loss.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train both, collect in between, measure, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier-epochs", type=int, default=30)
    parser.add_argument("--channels", type=int, default=64, help="of the layer")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--k", type=int, default=8, help="latents that are on")
    parser.add_argument("--epochs", type=int, default=30, help="of the dictionary")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the dictionary")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--accelerator", default="cpu", help="as for lightning.Trainer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/dictionary_activations"), help="output folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning's own use of torch's pytree
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(args.threads)

    L.seed_everything(args.seed, verbose=False)
    images, test = digits(args.seed)
    network = classifier(images, args.channels, args.classifier_epochs)
    with torch.no_grad():
        accuracy = (network(test.x).argmax(1) == test.y).double().mean().item()

    shutil.rmtree(args.out / "activations", ignore_errors=True)  # the network is a new one, and so is what it puts out
    batches = {"train": images.x.split(64), "test": test.x.split(64)}
    shards = {
        name: ae.collect_activations(
            network, LAYER, parts, args.out / "activations" / name, dtype="float16", feature_dim=1, shard_rows=16_384
        )
        for name, parts in batches.items()
    }
    data = ae.ActivationDataModule(args.out / "activations" / "train", args.batch_size, seed=args.seed)
    model = train(data, args)

    rows = shards["test"].rows(torch.arange(len(shards["test"]))).float()
    numbers, frequency = measure(model, network, rows, shards["train"].mean, test)
    numbers |= {"accuracy": accuracy, "rows": len(shards["train"]), "shards": len(shards["train"].sizes)}
    numbers["fvu_pca"] = principal_components(shards["train"], rows, args.k)
    ae.save_saelens(model, args.out / "saelens")
    for name in (
        "accuracy",
        "rows",
        "shards",
        "fvu",
        "fvu_pca",
        "l0",
        "dead",
        "norm_ratio",
        "relative_bias",
        "overlap",
    ):
        print(f"{name:16}{numbers[name]:10.4g}")
    for name in ("clean", "splice", "mean", "zero"):
        print(f"loss {name:11}{numbers[f'loss_{name}']:10.4g}")
    print(f"recovered against the mean {numbers['recovered_mean']:.4f}, against zero {numbers['recovered_zero']:.4f}")
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    found = answers(model, shards["train"], images, number=16, best=10)
    draw(args.out / "dictionary_activations.png", found, frequency, numbers, args.k)
    return numbers


if __name__ == "__main__":
    main()
