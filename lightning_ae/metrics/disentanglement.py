"""Whether each factor of variation has a latent of its own, for data whose factors are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_ae.checks import check_flag, check_seed, check_share, check_tensor, check_whole

Array = NDArray[Any]


class DCI(NamedTuple):
    """What :func:`dci` measures, in [0, 1] except for a negative :math:`R^2`; more is better.

    Attributes:
        disentanglement: 1 if each latent matters to one factor at most.
        completeness: 1 if to each factor one latent matters.
        informativeness: how well factors are predicted for examples that were held out.
    """

    disentanglement: float
    completeness: float
    informativeness: float


def mutual_information_gap(
    z: Tensor | ArrayLike, factors: Tensor | ArrayLike, *, bins: int = 20, continuous: bool = False
) -> float:
    r"""MIG: :math:`\frac1K\sum_k \frac{1}{H(v_k)}\bigl(I(z_{j_1}; v_k) - I(z_{j_2}; v_k)\bigr)`.

    :math:`j_1` and :math:`j_2` are the latents that know most and second most of the factor :math:`v_k`: 1 if one
    latent tells each factor in full and no other latent tells anything of it, 0 if two latents tell the same. It does
    not ask whether a latent tells of several factors. Entropies are those of counts, with latents in bins of equal
    width, as in disentanglement_lib. Counts of few examples find information where there is none, about
    (bins − 1)(values − 1)/2N nats in each pair: take N in the thousands. A single latent is compared with 0.

    Args:
        z: latents (of a VAE, posterior means), ``(N, D)``.
        factors: known factors, ``(N, K)``: whole numbers, each a class.
        bins: how many for each latent, between its smallest and largest value.
        continuous: factors are real numbers, put into bins as latents are.

    Returns:
        From 0 to 1, no unit.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: for other shapes, numbers that are not finite, a factor with one value only, or factors that are not
            whole numbers unless ``continuous``.

    Source: Chen et al. 2018, https://arxiv.org/abs/1802.04942, equation 6; disentanglement_lib,
    https://arxiv.org/abs/1811.12359.

    Example:
        >>> import torch
        >>> v = torch.cartesian_prod(torch.arange(4), torch.arange(3))
        >>> round(mutual_information_gap(v.float() ** 2, v), 4)  # a latent for each factor
        1.0
        >>> round(mutual_information_gap(torch.cat([v, v], 1), v), 4)  # two for each
        0.0
    """
    metrics = _sklearn("metrics")
    latents, values = _checked(z, factors, continuous)
    continuous = check_flag("continuous", continuous)
    if check_whole("bins", bins) < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}.")
    latents = np.stack([_binned(column, bins) for column in latents.T], 1)
    if continuous:
        values = np.stack([_binned(column, bins) for column in values.T], 1)
    gaps = []
    for v in values.T:
        entropy = metrics.mutual_info_score(v, v)
        gaps.append(_gap([metrics.mutual_info_score(v, latent) for latent in latents.T]) / entropy)
    return float(np.mean(gaps))


def dci(
    z: Tensor | ArrayLike,
    factors: Tensor | ArrayLike,
    *,
    continuous: bool = False,
    test_fraction: float = 0.25,
    trees: int = 10,
    seed: int = 0,
) -> DCI:
    r"""DCI: disentanglement :math:`\sum_j \rho_j(1 - H_K(P_j))`, completeness :math:`1 - H_D(\tilde P_k)`, accuracy.

    A random forest predicts each factor from all latents, and :math:`R_{jk} \ge 0` is the importance of latent
    :math:`j` for factor :math:`k`. :math:`P_j` are the importances of a latent, over factors and normalised,
    :math:`\tilde P_k` those of a factor, over latents; :math:`H_K` is the entropy to base :math:`K`. Latents are
    weighted by their share :math:`\rho_j` of all importance; completeness is the mean over factors. Informativeness is
    the forests' accuracy for classes, or their :math:`R^2`, on examples that were held out, averaged over factors (the
    paper has the error).

    Each split of a tree may look at all latents, so that a latent that tells nothing gets no importance by being the
    only one on offer.

    Args:
        z: latents, ``(N, D)``.
        factors: known factors, ``(N, K)``: whole numbers, each a class.
        continuous: factors are real numbers, predicted by regression.
        test_fraction: share of the examples held out for informativeness.
        trees: how many in a forest.
        seed: decides the split and the forests.

    Returns:
        A :class:`DCI`. With one factor disentanglement is 1, with one latent completeness is.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: as for :func:`mutual_information_gap`.

    Source: Eastwood & Williams 2018, https://openreview.net/forum?id=By-7dz-AZ, section 2.

    Example:
        >>> import torch
        >>> v = torch.cartesian_prod(torch.arange(4), torch.arange(3)).repeat(20, 1)
        >>> dci(v.float() ** 2, v)
        DCI(disentanglement=1.0, completeness=1.0, informativeness=1.0)
    """
    ensemble = _sklearn("ensemble")
    latents, values = _checked(z, factors, continuous)
    continuous, trees = check_flag("continuous", continuous), check_whole("trees", trees)
    seed = check_seed("seed", seed, most=2**32 - 1)
    train, test = _split(len(latents), test_fraction, seed)
    importance, scores = [], []
    for v in values.T:
        kind = ensemble.RandomForestRegressor if continuous else ensemble.RandomForestClassifier
        forest = kind(n_estimators=trees, max_features=None, random_state=seed).fit(latents[train], v[train])
        importance.append(forest.feature_importances_)
        scores.append(forest.score(latents[test], v[test]))
    matrix = np.stack(importance, 1)  # (D, K)
    share = matrix.sum(1) / max(matrix.sum(), np.finfo(float).tiny)
    disentanglement = float((share * _concentration(matrix)).sum())
    return DCI(disentanglement, float(_concentration(matrix.T).mean()), float(np.mean(scores)))


def sap(z: Tensor | ArrayLike, factors: Tensor | ArrayLike, *, continuous: bool = False) -> float:
    r"""Separated attribute predictability: :math:`\frac1K\sum_k (S_{j_1 k} - S_{j_2 k})`, the best two scores' gap.

    :math:`S_{jk}` says how well latent :math:`j` alone predicts factor :math:`k`: the squared correlation
    :math:`\operatorname{cov}(z_j, v_k)^2/\operatorname{var}(z_j)\operatorname{var}(v_k)` for real numbers, and for
    classes the balanced accuracy of thresholds on it, as many as there are classes less one, found one after another by
    a decision tree (for more than two classes there may be slightly better ones). A latent that tells nothing has the
    score of chance, so for classes the gap is 1 − 1/values at most. A single latent is compared with one that tells
    nothing.

    Numbers of disentanglement_lib differ where a factor has more than two values: its linear classifier, one class
    against the rest, cannot cut a class out of the middle, as the paper's thresholds do.

    Args:
        z: latents, ``(N, D)``.
        factors: known factors, ``(N, K)``: whole numbers, each a class.
        continuous: factors are real numbers.

    Returns:
        From 0 to 1, no unit.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: as for :func:`mutual_information_gap`.

    Source: Kumar, Sattigeri & Balakrishnan 2018, https://arxiv.org/abs/1711.00848, section 3.

    Example:
        >>> import torch
        >>> v = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        >>> sap(v.float() ** 2, v)  # 1 against a chance of one in four
        0.75
        >>> round(sap(v.float(), v, continuous=True), 4)
        1.0
    """
    continuous = check_flag("continuous", continuous)
    latents, values = _checked(z, factors, continuous)
    score = _squared_correlation if continuous else _above_chance
    return float(np.mean([_gap([score(latent, v) for latent in latents.T]) for v in values.T]))


def _sklearn(module: str) -> Any:
    try:
        import sklearn.ensemble
        import sklearn.metrics
        import sklearn.tree
    except ImportError as error:
        raise ImportError('Disentanglement needs scikit-learn: pip install "lightning-ae[recipes]"') from error
    return getattr(sklearn, module)


def _checked(z: Any, factors: Any, continuous: bool) -> tuple[Array, Array]:
    """Both as arrays: latents float64; factors float64, or int64 if they are classes."""
    continuous = check_flag("continuous", continuous)
    latents, values = (_to_numpy(name, value) for name, value in (("z", z), ("factors", factors)))
    if len(latents) != len(values):
        raise ValueError(f"factors: expected ({len(latents)}, K) as z has {len(latents)} rows, got {values.shape}.")
    for k, column in enumerate(values.T):
        if (column == column[0]).all():
            raise ValueError(f"factors: number {k} has one value only, {column[0]:g}; leave it out.")
        if not continuous and (column != column.round()).any():
            raise ValueError(f"factors: number {k} is not whole, as classes are; say continuous=True for real numbers.")
    return latents, values if continuous else values.astype(np.int64)


def _to_numpy(name: str, value: Any) -> Array:
    if isinstance(value, Tensor):
        check_tensor(name, value)
        value = value.detach().cpu().double().numpy()
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise TypeError("complex numbers")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of real numbers, got {error}.") from error
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name}: expected (N, {'D' if name == 'z' else 'K'}), got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers.")
    return array


def _binned(column: Array, bins: int) -> Array:
    return np.digitize(_to_unit(column), np.linspace(0, 1, bins + 1)[1:-1])


def _to_unit(column: Array) -> Array:
    """Moved and scaled to [0, 1], however small the differences are; a constant is 0."""
    low, high = column.min(), column.max()
    scaled: Array = (column - low) / (high - low if high > low else 1)
    return scaled


def _gap(scores: list[float]) -> float:
    """Between the best and the second best; with one latent there is nothing beside it."""
    second, best = sorted([0.0, *scores])[-2:]
    return best - second


def _split(n: int, test_fraction: float, seed: int) -> tuple[Array, Array]:
    test_fraction = check_share("test_fraction", test_fraction, "()")
    if n < 2:
        raise ValueError(f"z: expected two examples or more, to hold some out, got {n}.")
    held_out = min(max(round(n * test_fraction), 1), n - 1)
    order = np.random.default_rng(seed).permutation(n)
    return order[held_out:], order[:held_out]


def _concentration(matrix: Array) -> Array:
    """One less the entropy of each row, to the base of its length; 0 for a row of zeros."""
    if matrix.shape[1] == 1:
        return np.ones(len(matrix))
    total = matrix.sum(1, keepdims=True)
    p = np.where(total > 0, matrix / np.where(total > 0, total, 1), 1 / matrix.shape[1])
    logarithm = np.log(np.where(p > 0, p, 1))
    concentration: Array = 1 + (p * logarithm).sum(1) / np.log(matrix.shape[1])
    return concentration


def _squared_correlation(latent: Array, v: Array) -> float:
    if latent.min() == latent.max():
        return 0.0
    (var_z, cov), (_, var_v) = np.cov(_to_unit(latent), _to_unit(v))
    return float(cov**2 / (var_z * var_v))


def _above_chance(latent: Array, v: Array) -> float:
    """Balanced accuracy, less that of a latent that tells nothing."""
    classes = len(np.unique(v))
    tree = _sklearn("tree").DecisionTreeClassifier(max_leaf_nodes=classes, class_weight="balanced", random_state=0)
    predicted = tree.fit(latent[:, None], v).predict(latent[:, None])
    return float(np.mean([(predicted[v == c] == c).mean() for c in np.unique(v)])) - 1 / classes
