r"""Sparse autoencoders where the answer is known: soft-thresholding and the LASSO.

The textbook's objective :math:`\|x - \hat x\|^2 + \lambda\|z\|_1` with a linear decoder :math:`\hat x = Dz` is, for a
given :math:`D`, a LASSO in :math:`z`. Two cases, on scikit-learn's digits less their mean:

* :math:`D` orthonormal (the digits' principal axes). The best code is known, :math:`S_{\lambda/2}(D^\top x)` with the
  soft-threshold :math:`S_t(c) = \operatorname{sgn}(c)\max(0, |c| - t)`. An encoder that can represent it (linear, then
  :class:`SoftThresholdCode` with learned thresholds) has to find it; a perceptron with :class:`L1Code` comes near.
* :math:`D` overcomplete (training digits as atoms). :func:`sparse_encode` (FISTA) has to agree with scikit-learn's
  ``sparse_encode``, whose :math:`\alpha` is :math:`\lambda/2`, as it halves the squared error. A trained
  :class:`LISTAEncoder` of few steps is to be nearer the minimum than as many of ISTA or FISTA; FISTA overtakes it
  where there is time for more.

Run ``python recipes/soft_threshold.py``; ``--help`` lists the options. It takes about a minute on two cores.

Source: Daubechies et al. 2004, https://arxiv.org/abs/math/0307152; Beck & Teboulle 2009,
https://doi.org/10.1137/080716542; Gregor & LeCun 2010, https://icml.cc/Conferences/2010/papers/449.pdf.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import lightning as L
import matplotlib
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.decomposition import sparse_encode as sklearn_sparse_encode
from torch import Tensor
from torch.nn.functional import normalize

import lightning_ae as ae

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Annealed(ae.SparseAutoencoder):
    """Adam with a learning rate that ends at zero, so that the batches' noise dies out."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A cosine over all steps; only of what is not frozen."""
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def frozen(dictionary: Tensor) -> ae.LinearDecoder:
    """A decoder ``(d, k)`` that is not trained."""
    decoder = ae.LinearDecoder(dictionary.shape[1], dictionary.shape[0], bias=False)
    with torch.no_grad():
        decoder.weight.copy_(dictionary)
    return decoder.requires_grad_(False)


def train(encoder: torch.nn.Module, dictionary: Tensor, code: ae.Code, x: Tensor, lr: float, epochs: int) -> Annealed:
    """Fit an encoder to data ``(N, d)`` and a fixed dictionary."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    model = Annealed(encoder, frozen(dictionary), code, lr=lr)
    trainer.fit(model, ae.TensorDataModule(x, batch_size=128, val_fraction=0))
    return model.eval()


@torch.no_grad()
def objective(x: Tensor, z: Tensor, dictionary: Tensor, lam: float) -> float:
    """Mean over examples of ``‖x − Dz‖² + λ‖z‖₁``, in double precision."""
    x, z, dictionary = x.double(), z.double(), dictionary.double()
    return float(((x - z @ dictionary.T).square().sum(1) + lam * z.abs().sum(1)).mean())


def orthonormal_case(train_x: Tensor, test_x: Tensor, args: argparse.Namespace, numbers: dict) -> dict[str, Tensor]:
    """Train on an orthonormal decoder; the test codes by name beside the projections ``"c"``."""
    axes = torch.linalg.eigh(train_x.T.double() @ train_x.double()).eigenvectors.flip(1).float()
    d, lam = axes.shape[0], args.weight
    c = test_x @ axes
    best = ae.soft_threshold(c, lam / 2)
    least = objective(test_x, best, axes, lam)
    L.seed_everything(args.seed, verbose=False)
    code = ae.SoftThresholdCode(0.05, weight=lam, num_latents=d)
    linear = train(ae.LinearEncoder(d, d), axes, code, train_x, 5e-2, args.epochs)
    perceptron = train(ae.MLPEncoder(d, d, hidden=(256,)), axes, ae.L1Code(lam), train_x, 2e-3, args.epochs)
    with torch.no_grad():
        codes = {"linear": linear.encode(test_x), "perceptron": perceptron.encode(test_x)}
    used = (c.abs() > lam / 2).float().mean(0) > 0.1  # where next to nothing exceeds λ/2, any larger threshold will do
    numbers["threshold"] = lam / 2
    numbers["axes_in_use"] = int(used.sum())
    numbers["learned_threshold_error"] = float((code.threshold.detach() - lam / 2)[used].abs().mean())
    for name, z in codes.items():
        numbers[f"{name}_code_error"] = float((z - best).norm() / best.norm())
        numbers[f"{name}_excess_objective"] = objective(test_x, z, axes, lam) / least - 1
    numbers["zeros_best"] = float((best == 0).float().mean())
    numbers["zeros_linear"] = float((codes["linear"] == 0).float().mean())
    return {"c": c, "best": best, **codes}


def overcomplete_case(train_x: Tensor, test_x: Tensor, args: argparse.Namespace, numbers: dict) -> dict:
    """Infer codes in a dictionary of digits by FISTA and scikit-learn; the excess over steps of three solvers."""
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(train_x), generator=generator)[: args.atoms]
    dictionary, lam = normalize(train_x[chosen], dim=1).T.contiguous(), args.weight
    few = test_x[: args.lasso_examples]
    ours = ae.sparse_encode(few.double(), dictionary.double(), lam, max_steps=50_000, tolerance=1e-12)
    theirs = torch.from_numpy(
        sklearn_sparse_encode(
            few.double().numpy(),
            dictionary.T.double().numpy(),
            algorithm="lasso_lars",
            alpha=lam / 2,
            max_iter=10_000,
        )
    )
    numbers["fista_code_difference"] = float((ours - theirs).abs().max())
    numbers["fista_objective_difference"] = objective(few, ours, dictionary, lam) - objective(
        few, theirs, dictionary, lam
    )
    numbers["lasso_l0"] = float((ours != 0).sum(1).double().mean())

    best = ae.sparse_encode(test_x.double(), dictionary.double(), lam, max_steps=50_000, tolerance=1e-10)
    least = objective(test_x, best, dictionary, lam)
    excess: dict[str, list[float]] = {"ISTA": [], "FISTA": [], "LISTA": []}
    decoder = frozen(dictionary)
    for steps in args.steps:
        tied = ae.LISTAEncoder(dictionary.shape[0], args.atoms, lam, steps, tied_to=decoder)
        learned = ae.LISTAEncoder(dictionary.shape[0], args.atoms, lam, steps, dictionary=dictionary)
        learned = train(learned, dictionary, ae.L1Code(lam), train_x, args.lista_lr, args.lista_epochs).encoder
        with torch.no_grad():
            codes = {
                "ISTA": tied(test_x),
                "FISTA": ae.sparse_encode(test_x, dictionary, lam, max_steps=steps),
                "LISTA": learned(test_x),
            }
        for name, z in codes.items():
            excess[name].append(objective(test_x, z, dictionary, lam) / least - 1)
            numbers[f"excess_{name}_{steps}"] = excess[name][-1]
    return {"ours": ours, "theirs": theirs, "excess": excess}


def draw(path: Path, known: dict[str, Tensor], lasso: dict, args: argparse.Namespace) -> None:
    """Codes over projections, FISTA over scikit-learn, excess over steps."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    c, t = known["c"].flatten(), args.weight / 2
    shown = torch.randperm(len(c), generator=torch.Generator().manual_seed(0))[:3000]
    span = torch.linspace(float(c.min()), float(c.max()), 500)
    for name, label, color in (
        ("perceptron", "perceptron, L1Code", "C1"),
        ("linear", "linear encoder, SoftThresholdCode", "C0"),
    ):
        left.plot(c[shown], known[name].flatten()[shown], ".", ms=3, color=color, label=label)
    left.plot(span, ae.soft_threshold(span, t), "--", color="black", lw=1, label=f"soft threshold at λ/2 = {t:g}")
    left.set(title="Orthonormal decoder: test codes", xlabel="projection Dᵀx", ylabel="code z", xlim=(-4 * t, 4 * t))
    left.set_ylim(-4 * t, 4 * t)
    middle.plot(lasso["theirs"].flatten(), lasso["ours"].flatten(), ".", ms=4, label="a coefficient")
    ends = [float(lasso["theirs"].min()), float(lasso["theirs"].max())]
    middle.plot(ends, ends, "--", color="black", lw=1, label="equal")
    middle.set(title=f"Dictionary of {args.atoms} digits: codes", xlabel="scikit-learn, lasso_lars", ylabel="FISTA")
    for name, marker in (("ISTA", "s"), ("FISTA", "^"), ("LISTA", "o")):
        label = "LISTA, trained" if name == "LISTA" else name
        right.loglog(args.steps, lasso["excess"][name], marker=marker, label=label)
    right.set(title="Distance from the minimum, test digits", xlabel="steps", ylabel="objective over its minimum − 1")
    right.set_xticks(args.steps, [str(step) for step in args.steps])
    right.minorticks_off()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, compare, draw; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/soft_threshold"), help="output folder")
    parser.add_argument("--weight", type=float, default=0.5, help="lambda, in units of grey levels from 0 to 1")
    parser.add_argument("--epochs", type=int, default=100, help="of the encoders for the orthonormal decoder")
    parser.add_argument("--atoms", type=int, default=128, help="digits in the dictionary")
    parser.add_argument("--lasso-examples", type=int, default=100, help="test digits given to scikit-learn")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="of the solvers")
    parser.add_argument("--lista-epochs", type=int, default=60)
    parser.add_argument("--lista-lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|torch.jit)")  # Lightning's and torch's own use of torch
    torch.set_num_threads(1)  # matrices this small only lose time on several

    splits = ae.DigitsDataModule(flat=True, seed=args.seed).splits()
    train_x, test_x = torch.as_tensor(splits["train"][0]), torch.as_tensor(splits["test"][0])
    mean = train_x.mean(0)
    train_x, test_x = train_x - mean, test_x - mean

    numbers: dict[str, float] = {"lambda": args.weight}
    known = orthonormal_case(train_x, test_x, args, numbers)
    lasso = overcomplete_case(train_x, test_x, args, numbers)
    for name, value in numbers.items():
        print(f"{name:30} {value:.4g}")
    (args.out / "numbers.json").write_text(json.dumps(numbers, indent=2))
    draw(args.out / "soft_threshold.png", known, lasso, args)
    return numbers


if __name__ == "__main__":
    main()
