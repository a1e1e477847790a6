"""The benchmarks of dictionaries, each in a tiny form."""

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def load():
    """A recipe as a module; gives the number of threads back."""
    threads = torch.get_num_threads()

    def call(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield call
    torch.set_num_threads(threads)


def test_the_dense_step_that_we_are_compared_with_is_the_same_step(load, monkeypatch):
    """After five steps with the same seed, all weights agree."""
    module = load("dictionary")
    x = torch.randn(64, 8) + 1
    x *= 8**0.5 / (x - x.mean(0)).norm(dim=1).mean()  # a scale of 1
    adam, weights = torch.optim.AdamW, {}
    for name in ("ours", "dense"):
        found = []

        def spy(parameters, found=found, **options):
            given = list(parameters)
            found.extend(p for part in given for p in (part["params"] if isinstance(part, dict) else [part]))
            return adam(given, **options)

        monkeypatch.setattr(torch.optim, "AdamW", spy)
        torch.manual_seed(0)
        step = module.KINDS[name](x, 32, 4)
        for _ in range(5):
            step()
        weights[name] = {tuple(p.shape): [q.detach() for q in found if q.shape == p.shape] for p in found}
    ours, dense = weights["ours"], weights["dense"]
    assert set(ours) == set(dense) == {(32, 8), (32,), (8,)}
    # the two matrices are encoder and atoms; of these, the atoms have norm 1
    for shape in ours:
        by_norm = [sorted(w[shape], key=lambda t: float((t.norm(dim=-1) - 1).abs().max())) for w in (ours, dense)]
        for a, b in zip(*by_norm, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_speed_is_compared_with_the_bare_product(load):
    options = ["--features", "8", "--latents", "32", "--k", "4", "--batch", "64", "--repeats", "2", "--threads", "1"]
    ratios = load("dictionary").main([*options, "--only", "ours", "dense"])
    assert list(ratios) == ["encoder GEMM", "ours", "dense"]
    assert ratios["encoder GEMM"] == 1
    assert ratios["ours"] > 0


def test_remedies_leave_fewer_dead(load):
    found = load("dead_latents").main([
        "--features", "16", "--atoms", "64", "--latents", "256", "--k", "3", "--active", "3", "--examples", "4096",
        "--batch", "128", "--epochs", "6", "--fresh", "2000", "--ways", "none", "all",
    ])  # fmt: skip
    assert found["all"]["dead"] < found["none"]["dead"] / 2
    assert all(0 < row["fvu"] < 1 for row in found.values())
