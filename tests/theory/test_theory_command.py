"""`holdfast theory`: what it prints, what it refuses, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from holdfast.theory import REGIMES, forgetting_at, random_tasks


def test_the_command_prints_regimes_and_ordering(holdfast):
    result = holdfast("theory", "--draws", "2", "--dim", "3")
    assert (result.code, result.err) == (0, "")
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in result.out.splitlines()
    ]
    assert ["naive", "0", "0", "2.500", "0.781", "100%", "0.000"] in rows
    assert ["replay", "0.1", "0", "2.250", "0.633", "81%", "0.008"] in rows
    assert ["kl_anchor", "0", "0.5", "1.667", "0.347", "44%", "0.087"] in rows
    assert ["both", "0.1", "0.5", "1.500", "0.281", "36%", "0.125"] in rows
    assert ["1", "rewind", "0.281", "0.6", "scale"] in rows


def test_the_command_as_json_agrees_with_the_library(holdfast):
    words = ["--learnt", "0.7", "--draws", "3", "--dim", "4", "--overlap", "0.2"]
    words += ["--fisher-noise", "0.5", "--seed", "9", "--json"]
    found = json.loads(holdfast("theory", *words).out)
    assert [row["regime"] for row in found["regimes"]] == list(REGIMES)
    assert found["ordering"]["task_loss"] == pytest.approx(0.3 * 0.78125)
    drawn_tasks = [random_tasks(4, seed=s, overlap=0.2, fisher_noise=0.5) for s in (9, 10, 11)]
    for row in found["draws"]["levers"]:
        ratios = [
            forgetting_at(row["lever"], 0.3 * tasks.start, tasks)
            / forgetting_at("replay", 0.3 * tasks.start, tasks)
            for tasks in drawn_tasks
        ]
        assert row["median"] == pytest.approx(sorted(ratios)[1], rel=1e-6)
        assert (row["low"], row["high"]) == pytest.approx((min(ratios), max(ratios)), rel=1e-6)
    assert [row["mean_place"] for row in found["draws"]["levers"]] == sorted(
        row["mean_place"] for row in found["draws"]["levers"]
    )


def test_the_command_refuses_a_share_that_is_none(holdfast):
    result = holdfast("theory", "--learnt", "84")
    assert (result.code, result.out) == (2, "")
    assert (
        result.err == "holdfast: --learnt: 84.0 is not in 0.001 to 0.999; give one such as 0.84\n"
    )


def test_the_command_needs_no_torch():
    code = "import sys; from holdfast.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "theory", "--draws", "1", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.split()
    assert "holdfast.theory.quadratic" in loaded
    assert not {"torch", "transformers", "datasets"} & set(loaded)
