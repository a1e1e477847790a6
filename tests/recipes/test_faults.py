"""The benchmark of planted faults, in its tiny form."""

from __future__ import annotations


def test_planted_faults_do_harm_and_are_counted(run, capsys):
    found = run("benchmarks/faults", "--tiny", "--jobs", 1)
    planted = found["kinds"]["softmax over one unit"]
    assert planted["runs"] == 1
    assert planted["harmed"] == 1
    assert [row["host"] for row in found["cases"] if row["kind"] == "healthy"] == [
        "our mlp", "mlp ae", "mlp binary", "mlp regression",
    ]  # fmt: skip
    halves = found["halves"]
    assert halves["fit"]["runs"] + halves["held"]["runs"] == halves["all"]["runs"] == len(found["cases"]) - 4
    for row in found["kinds"].values():
        assert 0 <= row["first"] <= row["any"] <= 1
        assert sum(found["confusion"]["softmax over one unit"].values()) == 1
    assert not any(row["raised"] for row in found["cases"])
    assert "softmax over one unit" in capsys.readouterr().out
