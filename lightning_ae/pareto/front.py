"""Points of two objectives, and what is worth knowing about them: who dominates whom, how much, where it bends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lightning_ae.checks import check_finite, check_sequence, check_type
from lightning_ae.files import read_json
from lightning_ae.models import Autoencoder, load
from lightning_ae.pareto.plot import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class ParetoFront:
    r"""Models along a trade-off, each with its two objectives, both to be made small.

    Point :math:`i` *dominates* :math:`j` if it is no worse in both objectives and better in one; the points that
    nobody dominates are the front. Equal points do not dominate each other. A point with an objective that is not
    finite, from a training that diverged, is on no front and dominates nobody.

    Args:
        alphas: weight of the pixel loss of each point, ``n`` numbers.
        objectives: raw pixel and raw perceptual loss of each point, ``(n, 2)``, in the losses' own units.
        models: the model of each point; none at all is fine too.

    Raises:
        ValueError: if there is no point, or the lengths differ.

    Source: Miettinen 1998, Nonlinear Multiobjective Optimization, chapter 2.

    Example:
        >>> front = ParetoFront([0.0, 0.5, 0.8, 1.0], [[4.0, 1.0], [2.0, 2.0], [3.0, 3.0], [1.0, 4.0]])
        >>> front.non_dominated()
        tensor([ True,  True, False,  True])
        >>> front.hypervolume((5.0, 5.0)), front.knee()
        (11.0, 1)
    """

    alphas: Tensor
    objectives: Tensor
    models: tuple[Autoencoder, ...] = field(default=(), repr=False)

    def __init__(
        self,
        alphas: Tensor | Sequence[float],
        objectives: Tensor | Sequence[Sequence[float]],
        models: Sequence[Autoencoder] = (),
    ) -> None:
        # both on the CPU in float64: a handful of numbers that are compared exactly
        for name, value in (("alphas", alphas), ("objectives", objectives)):
            object.__setattr__(self, name, _as_numbers(name, value))
        object.__setattr__(self, "models", tuple(check_sequence("models", models, "models")))
        n = self.alphas.numel()
        if n == 0 or self.alphas.shape != (n,) or self.objectives.shape != (n, 2):
            raise ValueError(
                "objectives: expected shape (n, 2) for n > 0 alphas, "
                f"got {tuple(self.objectives.shape)} for alphas of shape {tuple(self.alphas.shape)}."
            )
        if len(self.models) not in (0, n):
            raise ValueError(f"models: expected {n}, one for each point, or none, got {len(self.models)}.")
        for model in self.models:
            check_type("models", model, Autoencoder)

    def __len__(self) -> int:
        return len(self.alphas)

    def non_dominated(self) -> Tensor:
        """Which points are on the front, ``(n,)`` of bool; of equal points all are."""
        finite = self.objectives.isfinite().all(1)
        ours, theirs = self.objectives[:, None], self.objectives[None]
        beaten = (theirs <= ours).all(2) & (theirs < ours).any(2) & finite[None]
        return finite & ~beaten.any(1)

    def hypervolume(self, reference: Sequence[float]) -> float:
        r"""Area that the front dominates below a reference point, :math:`|\{y : \exists i\; f_i \le y \le r\}|`.

        The larger the better, and only a front that is nowhere worse has it larger for every reference. Compare
        fronts with the same reference only.

        Args:
            reference: the worst acceptable objectives, ``(pixel, perceptual)``; points that are not better than it in
                both add nothing.

        Raises:
            ValueError: if the reference is not two finite numbers.

        Source: Zitzler & Thiele 1998, https://doi.org/10.1007/BFb0056872.
        """
        corner = [check_finite("reference", value) for value in check_sequence("reference", reference)]
        if len(corner) != 2:
            raise ValueError(f"reference: expected two finite numbers (pixel, perceptual), got {reference!r}.")
        width, ceiling = corner
        area = 0.0
        for pixel, perceptual in sorted(self.objectives[self.non_dominated()].tolist()):
            if pixel < width and perceptual < ceiling:  # the strip between this point and the one before
                area += (width - pixel) * (ceiling - perceptual)
                ceiling = perceptual
        return area

    def knee(self) -> int:
        """Index of the point of the front where both objectives are cheap: giving up either buys little of the other.

        It is the one that bulges furthest from the chord between the ends of the front towards the ideal point, after
        both objectives are scaled to [0, 1] over the front; the first of equals. On a front of one or two points, or
        one that bulges the other way, it is an end.

        Raises:
            ValueError: if no point is finite.

        Source: Das 1999, On characterizing the "knee" of the Pareto curve based on normal-boundary intersection,
        https://doi.org/10.1007/BF01195985.
        """
        on_front = self.non_dominated().nonzero()[:, 0]
        if len(on_front) == 0:
            raise ValueError("objectives: no point is finite, so there is no front.")
        points = self.objectives[on_front]
        best, worst = points.amin(0), points.amax(0)
        span = (worst - best).where(worst > best, 1.0)  # equal points are all the knee
        # the chord is u + v = 1 in scaled objectives; argmin is not promised to be the first of equals
        height = ((points - best) / span).sum(1)
        return int(on_front[(height == height.min()).nonzero()[0, 0]])

    def plot(self, target: str | Path | Axes, reference: Sequence[float] | None = None) -> Axes:
        """Draw the points coloured by α, dominated ones hollow, the front as stairs and its knee in a ring.

        Args:
            target: axes to draw on, or the path of a picture to write.
            reference: shade the area that the front dominates below this point, and put it in the title.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        axes: Axes = plot(self, target, reference)
        return axes

    def save(self, folder: str | Path) -> None:
        """Write ``front.json`` and a checkpoint for each model, which :func:`lightning_ae.load` reads as well.

        Args:
            folder: made if need be; a front that is already there is overwritten.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"model_{i:03d}.ckpt" for i in range(len(self.models))]
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_model_summary", "enable_progress_bar"), False)
        trainer = L.Trainer(accelerator="cpu", **quiet)
        for name, model in zip(names, self.models, strict=True):
            trainer.strategy.connect(model)
            trainer.save_checkpoint(folder / name, weights_only=True)
        content = {"alphas": self.alphas.tolist(), "objectives": self.objectives.tolist(), "models": names}
        (folder / "front.json").write_text(json.dumps(content, indent=2))

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> ParetoFront:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder.
            **options: for :func:`lightning_ae.load` of each model: ``trusted``, and parts that a checkpoint cannot
                record, such as your own Φ: ``**{"loss.perceptual.features": phi}``.

        Returns:
            The front, its models in evaluation mode and in the default floating dtype.

        Raises:
            FileNotFoundError: if there is no front in the folder.
            ValueError: if it is not a front, or a model cannot be rebuilt.
        """
        path = Path(folder) / "front.json"
        if not path.is_file():
            raise FileNotFoundError(f"No front at {path}.")
        what = "a front that ParetoFront.save wrote"
        content = read_json(path, what)
        names = content.get("models")
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{path} is not {what}: models is no list of files in this folder.")
        try:
            points = cls(content["alphas"], content["objectives"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not {what}: {error}") from error
        if len(names) not in (0, len(points)):
            raise ValueError(f"{path} is not {what}: it lists {len(names)} models for {len(points)} points.")
        models = [load(Path(folder) / name, **options).eval() for name in names]
        return cls(points.alphas, points.objectives, models)


def _as_numbers(name: str, values: Any) -> Tensor:
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: expected numbers, got {error}.") from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {numbers.dtype}.")
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
