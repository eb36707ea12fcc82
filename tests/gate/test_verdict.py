"""The decision: all guardrails pass, or nothing does; whatever is missing fails."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from holdfast.gate.verdict import Gate, GateResult, decide
from holdfast.meters import Reading


def read(name, values, *, meter="probe", unit="accuracy", tags=(), split="sealed", clusters=None):
    items = {f"{name}-{i}": float(value) for i, value in enumerate(values)}
    value = float(np.mean(list(items.values()))) if items else math.nan
    return Reading(
        meter, name, split, 0, value, 0.1, len(items), unit,
        tags=tags, items=items, clusters=clusters or {},
    )  # fmt: skip


def flipped(values, down=0, up=0):
    values = list(values)
    ones = [i for i, v in enumerate(values) if v == 1][:down]
    zeros = [i for i, v in enumerate(values) if v == 0][:up]
    return [0 if i in ones else 1 if i in zeros else v for i, v in enumerate(values)]


BASE = [1, 0] * 500
SAME = read("mmlu", BASE)
FALLEN = read("mmlu", flipped(BASE, down=100))
UNSURE = read("mmlu", flipped(BASE, down=60, up=45))
RISEN = read("task", flipped(BASE, up=200), tags=("target",))
TARGET = read("task", BASE, tags=("target",))


def only(result: GateResult):
    (row,) = result.rows
    return row


@pytest.mark.parametrize(
    ("after", "verdict", "code"),
    [(SAME, "PASS", 0), (FALLEN, "FAIL", 3), (UNSURE, "INCONCLUSIVE", 4)],
)
def test_one_guardrail(after, verdict, code):
    result = decide([SAME], [after], Gate())
    assert result.verdict == verdict == only(result).verdict
    assert result.exit_code == code
    assert result.reason.startswith(verdict)


def test_a_row_tells_its_numbers():
    row = only(decide([SAME], [FALLEN], Gate()))
    assert (row.before, row.after, row.difference) == pytest.approx((0.5, 0.4, -0.1))
    assert row.lower < -0.1 < row.upper < -0.02
    assert row.margin == pytest.approx(0.02)
    assert "fall of 10.0pt" in row.reason
    assert "margin of 2pt" in row.reason
    assert row.items_needed is None


def test_an_undecided_row_says_how_many_items_would_do():
    row = only(decide([SAME], [UNSURE], Gate()))
    assert row.items_needed is not None
    assert row.items_needed > row.n == 1000
    assert f"about {row.items_needed:,} items would decide" in row.reason


def test_one_failure_among_many_fails_and_one_doubt_is_a_doubt():
    others = [read(f"probe{i}", BASE) for i in range(5)]
    assert decide([SAME, *others], [SAME, *others], Gate()).verdict == "PASS"
    assert decide([SAME, *others], [UNSURE, *others], Gate()).verdict == "INCONCLUSIVE"
    failed = decide([SAME, *others], [FALLEN, *others], Gate())
    assert failed.verdict == "FAIL"
    assert "mmlu" in failed.reason
    other = read("other", flipped(BASE, down=60, up=45))
    both = decide([SAME, read("other", BASE)], [FALLEN, other], Gate())
    assert both.verdict == "FAIL"


# --- fails closed --------------------------------------------------------------------------------

BROKEN = {
    "missing": ([], "not read after"),
    "twice": ([SAME, SAME], "read 2 times after"),
    "empty": ([read("mmlu", [])], "no items after"),
    "other items": ([read("mmlu", BASE[:-1])], "other items"),
    "nan": ([read("mmlu", [math.nan, *BASE[1:]])], "not finite"),
    "other unit": ([replace(SAME, unit="nats")], "'nats' after"),
    "beyond one": ([read("mmlu", [2, *BASE[1:]])], "outside 0..1"),
    "other clusters": ([replace(SAME, clusters={"mmlu-0": "a"})], "clustered otherwise"),
    "other kind": ([replace(SAME, tags=("target",))], "target after"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_compared_fails_with_a_reason(case):
    after, reason = BROKEN[case]
    fine = read("fine", BASE)
    result = decide([SAME, fine], [*after, fine], Gate())
    assert result.verdict == "FAIL"
    assert reason in next(row.reason for row in result.rows if row.name == "mmlu")
    assert reason in result.reason


def test_a_probe_read_only_after_fails():
    result = decide([], [SAME], Gate())
    assert result.verdict == "FAIL"
    assert "not read before" in result.reason


def test_an_unknown_unit_fails():
    odd = replace(SAME, unit="bananas")
    assert "bananas" in decide([odd], [odd], Gate()).reason


@pytest.mark.parametrize("readings", [[], [replace(SAME, split="selection")], [TARGET]])
def test_nothing_guarded_is_never_a_pass(readings):
    after = [RISEN] if TARGET in readings else readings
    result = decide(readings, after, Gate())
    assert result.verdict == "INCONCLUSIVE"
    assert "no guardrail" in result.reason


def test_only_judged_meters_on_the_sealed_split_count():
    drift = Reading("drift", "layer0", "sealed", 10, 0.5, None, 1, "relative")
    kl = Reading("kl", "new", "sealed", 10, 5.0, 0.1, 10, "nats", items={"a": 5.0})
    chosen = replace(FALLEN, split="selection")
    result = decide([SAME], [SAME, drift, kl, chosen], Gate())
    assert [row.name for row in result.rows] == ["mmlu"]
    assert result.verdict == "PASS"


def test_a_margin_for_nothing_read_fails():
    result = decide([SAME], [SAME], Gate(margins={"gsmk8": "3pt"}))
    assert result.verdict == "FAIL"
    assert "gsmk8" in result.reason


def test_a_margin_in_the_wrong_unit_fails_and_says_what_to_write():
    result = decide([SAME], [SAME], Gate(margins={"mmlu": "3%"}))
    assert result.verdict == "FAIL"
    assert "mmlu: 3pt" in result.reason


# --- kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rise", "verdict"), [(0.001, "PASS"), (0.2, "FAIL")])
def test_a_canary_is_judged_relative_to_the_base_loss(rise, verdict):
    rng = np.random.default_rng(0)
    base = rng.gamma(9, 0.3, 200)
    tuned = base * (1 + rise) + rng.normal(0, 0.01, 200)
    documents = {"meter": "canary", "unit": "nats"}
    row = only(
        decide([read("code", base, **documents)], [read("code", tuned, **documents)], Gate())
    )
    assert row.kind == "canary"
    assert row.verdict == verdict
    assert row.margin == pytest.approx(0.01 * base.mean())
    assert row.difference == pytest.approx((tuned - base).mean())
    assert row.lower < row.difference < row.upper
    assert ("rise of" in row.reason) is (rise > 0)


def test_a_falling_loss_passes():
    base = np.linspace(1, 3, 50)
    documents = {"meter": "canary", "unit": "nats"}
    row = only(decide([read("c", base, **documents)], [read("c", base * 0.9, **documents)], Gate()))
    assert row.verdict == "PASS"
    assert row.difference < 0
    assert row.reason == "no rise"


def test_clusters_reach_the_statistics():
    clusters = {f"mmlu-{i}": str(i // 100) for i in range(1000)}
    clustered = replace(SAME, clusters=clusters)
    row = only(decide([clustered], [clustered], Gate()))
    assert (row.n, row.clusters) == (1000, 10)
    assert row.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("target", "after", "verdict"),
    [
        ("rise", RISEN, "PASS"),
        ("rise", TARGET, "INCONCLUSIVE"),
        ("rise", read("task", flipped(BASE, down=100), tags=("target",)), "FAIL"),
        ("report", TARGET, "PASS"),
        ("report", read("task", flipped(BASE, down=100), tags=("target",)), "PASS"),
    ],
)
def test_targets_must_rise_unless_only_reported(target, after, verdict):
    result = decide([SAME, TARGET], [SAME, after], Gate(target=target))
    assert result.verdict == verdict
    row = next(row for row in result.rows if row.kind == "target")
    assert row.decisive is (target == "rise")
    assert row.margin is None


@pytest.mark.parametrize(("mode", "verdict"), [("report", "PASS"), ("guard", "FAIL")])
def test_over_application_counts_only_where_it_is_guarded(mode, verdict):
    before = read("elsewhere", [1] * 300, tags=("adoption",))
    after = read("elsewhere", [1] * 200 + [0] * 100, tags=("adoption",))
    result = decide([SAME, before], [SAME, after], Gate(adoption=mode))
    assert result.verdict == verdict
    row = next(row for row in result.rows if row.kind == "adoption")
    assert row.verdict == "FAIL"
    assert row.decisive is (mode == "guard")


@pytest.mark.parametrize("kind", ["rare", "control", "guardrail"])
def test_tags_name_the_kind(kind):
    tagged = replace(SAME, tags=(kind,))
    assert only(decide([tagged], [tagged], Gate())).kind == kind


# --- what is shown -------------------------------------------------------------------------------


def test_the_verdict_file_is_plain_json():
    result = decide([SAME, TARGET], [FALLEN], Gate())
    text = json.dumps(result.as_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["verdict"] == "FAIL"
    assert back["exit_code"] == 3
    assert {row["name"]: row["before"] for row in back["rows"]} == {"mmlu": 0.5, "task": None}


def test_tables_show_every_row_and_escape_names():
    name = "a|b[red]<script>"
    result = decide([read(name, BASE)], [read(name, BASE)], Gate())
    text = result.markdown()
    assert "<script>" not in text
    assert all(line.replace("\\|", "").count("|") == 10 for line in text.splitlines()[2:5])
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(result.table())
    shown = console.export_text()
    assert "a|b[red]<script>" in shown
    assert "PASS" in shown


def test_importing_the_gate_is_light():
    code = "import sys, holdfast.gate.verdict; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "scipy", "rich"} & set(done.stdout.split())
