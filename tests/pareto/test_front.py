"""Dominance, area and knee against their definitions; the picture; the folder."""

import itertools
import json
import math

import matplotlib
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn

from lightning_ae import AlphaMix, FeatureLoss, ImageGradients, MLPAutoencoder, ParetoFront, SquaredError, load

matplotlib.use("Agg")


def make_front(objectives):
    return ParetoFront([i / max(1, len(objectives) - 1) for i in range(len(objectives))], objectives)


def lattice(n, size=12):
    """Points on whole numbers, so that ties and duplicates are common and areas are counts of unit squares."""
    return torch.randint(0, size, (n, 2)).tolist()


def counted_area(points, reference):
    """Unit squares between the points and the reference that some point dominates."""
    cells = itertools.product(range(reference[0]), range(reference[1]))
    return sum(any(p[0] <= i and p[1] <= j for p in points) for i, j in cells)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 200])
def test_non_dominated_is_its_definition(n):
    points = lattice(n)
    expected = [not any(q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1]) for q in points) for p in points]
    assert make_front(points).non_dominated().tolist() == expected


def test_of_equal_points_all_are_on_the_front():
    assert make_front([[1, 1], [1, 1], [1, 2], [0, 3]]).non_dominated().tolist() == [True, True, False, True]


def test_a_diverged_point_is_on_no_front_and_dominates_nobody():
    front = make_front([[math.nan, 0], [2, 1], [-math.inf, -math.inf], [1, 2]])
    assert front.non_dominated().tolist() == [False, True, False, True]
    assert front.hypervolume((3, 3)) == 3
    assert front.knee() == 1


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_hypervolume_counts_the_dominated_unit_squares(n):
    points = lattice(n)
    for reference in ((12, 12), (6, 9)):  # some points lie beyond the second
        assert make_front(points).hypervolume(reference) == counted_area(points, reference)


def test_hypervolume_is_the_share_of_random_points_that_are_dominated():
    points, thrown = torch.rand(20, 2), torch.rand(200_000, 2)
    share = (points[None] <= thrown[:, None]).all(2).any(1).double().mean().item()
    assert make_front(points.tolist()).hypervolume((1, 1)) == pytest.approx(share, abs=4 * 0.5 / 200_000**0.5)


def test_hypervolume_by_hand():
    # three steps of a staircase below (4, 5): 1 × (5 − 4) + 1 × (5 − 2) + 1 × (5 − 1)
    assert make_front([[1, 4], [2, 2], [3, 1], [3, 3], [9, 0]]).hypervolume((4, 5)) == 1 + 3 + 4
    assert make_front([[5, 5]]).hypervolume((4, 4)) == 0


def test_the_knee_is_furthest_from_the_chord():
    angle = torch.linspace(math.pi, 1.5 * math.pi, 21)
    circle = torch.stack([1 + angle.cos(), 1 + angle.sin()], 1)  # bulges to the origin, furthest half way
    assert make_front(circle.tolist()).knee() == 10
    # units do not count
    assert make_front((circle * torch.tensor([1.0, 1000.0])).tolist()).knee() == 10
    # nor do dominated points: with the last two the second would be nearer to the scaled ideal than the third
    points = [[0, 9], [1, 6], [4, 4], [9, 0]]
    distances = [9 - x - y for x, y in points]
    assert make_front([*points, [90, 0], [9, 9]]).knee() == distances.index(max(distances))


@pytest.mark.parametrize("points", [[[1, 2]], [[1, 2], [1, 2]], [[1, 2], [2, 1]], [[0, 3], [2, 2.5], [3, 0]]])
def test_a_front_without_a_bulge_has_its_knee_at_the_first_end(points):
    assert make_front(points).knee() == 0


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="objectives: expected shape"):
        ParetoFront([], torch.empty(0, 2))
    with pytest.raises(ValueError, match="objectives: expected shape"):
        ParetoFront([0.5], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="models: expected 1"):
        ParetoFront([0.5], [[1.0, 2.0]], [nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match="reference: expected"):
        make_front([[1, 1]]).hypervolume((1.0, math.inf))
    with pytest.raises(ValueError, match="no point is finite"):
        make_front([[math.nan, 1]]).knee()


def test_the_picture_tells_dominated_points_the_knee_and_the_area(tmp_path):
    points = [[0, 9], [4, 4], [6, 6], [9, 0]]
    front = make_front(points)
    axes = Figure().add_subplot()
    assert front.plot(axes, (10, 10)) is axes
    dots, ring = (artist for artist in axes.collections if isinstance(artist, PathCollection))
    faces, edges = dots.get_facecolor(), dots.get_edgecolor()
    white = to_rgba("white")
    assert [tuple(face) == white for face in faces] == [False, False, True, False]
    assert all(tuple(edge) != white for edge in edges)
    assert ring.get_offsets().tolist() == [[4, 4]]
    assert "3 of 4" in axes.get_title()
    assert f"hypervolume {counted_area(points, (10, 10))}" in axes.get_title()
    front.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("objectives", [[[1, 2]], [[math.nan, math.nan]], [[1, 2], [1, 2]]])
def test_poor_fronts_can_be_drawn(objectives, tmp_path):
    make_front(objectives).plot(str(tmp_path / "front.png"), reference=(0.5, 3))
    assert (tmp_path / "front.png").stat().st_size > 1000


def make_model(alpha, phi):
    return MLPAutoencoder((1, 4, 4), 2, hidden=(5,), loss=AlphaMix(SquaredError(), FeatureLoss(phi), alpha))


def test_a_saved_front_reconstructs_the_same(tmp_path):
    front = ParetoFront(
        [0.0, 0.3], [[1.5, 2.5], [1.0, math.nan]], [make_model(a, ImageGradients()).eval() for a in (0.0, 0.3)]
    )
    front.save(tmp_path / "deep" / "front")
    again = ParetoFront.load(tmp_path / "deep" / "front")
    assert again.alphas.equal(front.alphas)
    assert again.objectives.allclose(front.objectives, rtol=0, atol=0, equal_nan=True)
    x = torch.rand(3, 1, 4, 4)
    for ours, theirs in zip(again.models, front.models, strict=True):
        assert not ours.training
        assert ours.loss.alpha == theirs.loss.alpha
        assert ours.reconstruct(x).equal(theirs.reconstruct(x))
    # each is an ordinary checkpoint
    assert load(tmp_path / "deep" / "front" / "model_001.ckpt").reconstruct(x).equal(front.models[1].reconstruct(x))


def test_a_phi_of_your_own_is_passed_again(tmp_path):
    phi = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    front = ParetoFront([0.5], [[1.0, 2.0]], [make_model(0.5, phi)])
    front.save(tmp_path)
    with pytest.raises(ValueError, match=r"loss.perceptual.features"):
        ParetoFront.load(tmp_path)
    (model,) = ParetoFront.load(tmp_path, **{"loss.perceptual.features": phi}).models
    x, params = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    assert model.loss(params, x).equal(front.models[0].loss(params, x))


def test_a_folder_that_is_no_front_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No front at"):
        ParetoFront.load(tmp_path)
    for content in ("{", json.dumps({"alphas": [1]}), "[]"):
        (tmp_path / "front.json").write_text(content)
        with pytest.raises(ValueError, match="not a front"):
            ParetoFront.load(tmp_path)
