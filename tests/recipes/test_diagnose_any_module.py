"""The recipe on a module that is not ours, in a tiny form."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "diagnose_any_module.py"


def test_findings_go_away_as_their_advice_is_followed(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("diagnose_any_module", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = module.main(["--epochs", "3", "--accelerator", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "lie outside [0, 1]" in printed.split("data in [0, 1]: squared error")[0]
    assert "lie outside [0, 1]" not in printed.split("data in [0, 1]: squared error")[1]
    assert numbers["as found"]["errors"] > numbers["and LeakyReLU"]["errors"] == 0
    assert numbers["as found"]["error"] > 2 * numbers["and LeakyReLU"]["error"]
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers
    assert (tmp_path / "diagnose_any_module.png").stat().st_size > 10_000
    assert (tmp_path / "as_found" / "diagnostics.md").is_file()
