"""The benchmark of planted faults, in its tiny form."""

from __future__ import annotations


def test_planted_faults_do_harm_and_are_named(run, capsys):
    found = run("benchmarks/faults", "--tiny", "--jobs", 1)
    assert [row["host"] for row in found["cases"] if row["kind"] == "healthy"] == [
        "our mlp", "mlp ae", "mlp binary", "mlp regression",
    ]  # fmt: skip
    assert not any(row["raised"] for row in found["cases"])
    assert found["healthy"]["short"]["errors"] == 0
    assert all(row["harmed"] == 1 for row in found["kinds"].values())
    halves = found["halves"]
    assert halves["fit"]["runs"] + halves["held"]["runs"] == halves["all"]["runs"] == len(found["cases"]) - 4
    assert all(0 <= row["first"] <= row["any"] <= 1 for row in found["kinds"].values())
    assert found["confusion"]["softmax over one unit"] == {"constant_softmax": 1}
    assert "softmax over one unit" in capsys.readouterr().out
