"""The benchmark of treatment, in its tiny form."""

from __future__ import annotations


def test_planted_faults_are_cured_or_said_to_be_out_of_reach(run, capsys):
    found = run("benchmarks/treatment", "--tiny", "--jobs", 1)
    assert not any(row["raised"] for row in found["cases"])
    healthy = [row for row in found["cases"] if row["kind"] == "healthy"]
    assert [row["host"] for row in healthy] == ["mlp binary", "mlp regression"]
    assert all(row["after"] == row["before"] == row["healthy"] and row["trials"] == 0 for row in healthy)
    softmax = found["kinds"]["softmax over one unit"]
    assert softmax["cured"] == 1
    assert softmax["after"] < 0.3 < softmax["before"]  # half of the answers, before
    broadcast = found["kinds"]["(B, 1) against (B,)"]
    assert broadcast["reach"] == 0
    assert broadcast["after"] == broadcast["before"]
    assert broadcast["why not"]
    assert not any(row["worse"] for row in found["cases"])
    assert "target.view_as" in capsys.readouterr().out
