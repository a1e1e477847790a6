"""The main job in a tiny form, and the YAML recipe."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from lightning_ae.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, RECIPES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_trains_compares_draws_and_reloads(tmp_path):
    arguments = ["--epochs", "2", "--out", str(tmp_path), "--accelerator", "cpu"]
    numbers = load("quickstart.py").main(arguments)
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()
    # PCA's error is what scikit-learn says of digits: most of the total variance of 19.6 explained by 8 components
    assert 1 < numbers["squared_error_pca"] < 2
    assert numbers["squared_error"] > numbers["squared_error_pca"]  # two epochs are not enough


def test_the_yaml_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ae"])
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    run = main(["fit", "-c", str(RECIPES / "variants" / "conv.yaml"), "--trainer.fast_dev_run=2", *quiet])
    assert run.trainer.global_step == 2


def test_the_overhead_benchmark_runs_and_ours_is_cheaper_than_logging_ten(capsys):
    ratios = load("benchmarks/trainer_overhead.py").main(["--steps", "20", "--repeats", "1"])
    assert ratios["lean Trainer, no logging"] == 1
    assert "µs/step" in capsys.readouterr().out
