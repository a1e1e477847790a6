"""The benchmark of a random search with and without early ends, in its tiny form."""

from __future__ import annotations


def test_hopeless_runs_are_ended_and_the_others_are_as_they_were(run, capsys):
    found = run("benchmarks/hopeless_search", "--configurations", 3, "--steps", 150, "--seed", 525)
    assert len(found["runs"]) == 3
    ended = [row for row in found["runs"] if row["cause"] is not None]
    assert found["stopped"] == len(ended) == len(found["errors of the stopped"]) >= 1
    assert all(row["stopping"]["steps"] < row["plain"]["steps"] == 150 for row in ended)
    assert min(found["errors of the stopped"]) > 0.9
    assert found["other weights without a stop"] == 0
    assert found["best error"]["plain"] == found["best error"]["stopping"]
    steps = found["search, steps"]
    assert steps["plain"] == 450
    assert steps["saved"] == 1 - steps["stopping"] / 450
    assert "to the best, seconds" in capsys.readouterr().out
