"""The worst-changed items, and the trajectories, from readings made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.meters import Reading
from holdfast.meters.probes import Item
from holdfast.report.data import ReportData
from holdfast.report.items import LONGEST_SHOWN, worst_changed
from holdfast.report.page import render_page
from holdfast.report.trajectories import MOST, trajectories


def reading(name, values, unit="accuracy", answers=(), **changes):
    items = {f"i{n}": float(value) for n, value in enumerate(values)}
    made = Reading(
        "probe",
        name,
        "sealed",
        0,
        0.0,
        0.0,
        len(items),
        unit,
        items=items,
        tags=("guardrail",),
        answers=dict(zip(items, answers, strict=False)),
    )
    return replace(made, **changes)


def exact(probe, n):
    return [
        Item(id=f"i{i}", probe=probe, kind="exact", prompt=f"q{i}", target="4") for i in range(n)
    ]


def test_both_answers_stand_side_by_side():
    before = [reading("sums", [1, 1, 0], answers=["4", "4", "no"])]
    after = [reading("sums", [1, 0, 1], answers=["4", "five", "4"])]
    (lost,) = worst_changed(before, after, exact("sums", 3))
    assert (lost.id, lost.prompt, lost.right) == ("i1", "q1", "4")
    assert (lost.answer_before, lost.answer_after) == ("4", "five")
    assert (lost.before, lost.after) == ("100.0%", "0.0%")


def test_the_worst_of_each_probe_in_turn():
    before = [reading("sums", [1] * 20), reading("loss", [1.0, 2.0, 3.0], unit="nats")]
    after = [reading("sums", [0] * 20), reading("loss", [1.5, 1.0, 9.0], unit="nats")]
    items = exact("sums", 20) + [
        Item(id=f"i{n}", probe="loss", kind="nll", prompt="x", target="y") for n in range(3)
    ]
    found = [(one.probe, one.id) for one in worst_changed(before, after, items)]
    assert found[:4] == [("sums", "i0"), ("loss", "i2"), ("sums", "i1"), ("loss", "i0")]
    assert len(found) == 10
    (only,) = worst_changed(before[1:], after[1:], items, most=1)
    assert (only.before, only.after, only.answer_after) == ("3.000 nats", "9.000 nats", None)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=12))
def test_what_is_listed_got_worse_and_nothing_worse_is_left_out(pairs):
    before = [reading("loss", [x for x, _ in pairs], unit="nats")]
    after = [reading("loss", [y for _, y in pairs], unit="nats")]
    items = [
        Item(id=f"i{n}", probe="loss", kind="nll", prompt="x", target="y")
        for n in range(len(pairs))
    ]
    listed = [one.id for one in worst_changed(before, after, items, most=3)]
    rises = {f"i{n}": y - x for n, (x, y) in enumerate(pairs)}
    wanted = sorted((r for r in rises.values() if r > 0), reverse=True)[:3]
    assert [rises[one] for one in listed] == wanted


def test_a_choice_is_named_and_a_long_prompt_shows_its_end():
    item = Item(
        id="i0",
        probe="c",
        kind="choice",
        prompt="x" * 4000 + "the question",
        choices=["Lima", "Quito"],
        answer=0,
    )
    (lost,) = worst_changed([reading("c", [1])], [reading("c", [0])], [item])
    assert lost.right == "Lima"
    assert lost.prompt.endswith("the question")
    assert len(lost.prompt) == LONGEST_SHOWN + 2


def record(meter, name, step, value, unit="nats", split="sealed", stderr=0.1):
    return {
        "meter": meter,
        "name": name,
        "step": step,
        "value": value,
        "unit": unit,
        "split": split,
        "stderr": stderr,
        "n": 5,
    }


def test_a_probe_is_one_curve_of_the_half_that_is_looked_at():
    readings = [
        record("probe", "sums", step, value, "accuracy", split)
        for split, values in (("selection", (0.5, 0.4, 0.3)), ("sealed", (0.9, None, 0.8)))
        for step, value in enumerate(values)
        if value is not None
    ]
    (figure,) = trajectories(ReportData("x", None, readings))
    (trace,) = figure.spec["data"]
    assert figure.key == "probes"
    assert trace["x"] == [0, 1, 2]
    assert trace["y"] == pytest.approx([50, 40, 30])
    assert trace["error_y"]["array"] == pytest.approx([19.6] * 3)  # 1.96 x 10 points


def test_every_other_meter_is_drawn_in_its_own_unit():
    readings = [record("kl", f"old/{n}", step, step * n) for n in range(12) for step in (0, 5)]
    readings += [
        record("walk", "x", step, 1.0 + step, unit) for step in (0, 5) for unit in ("norm", "ratio")
    ]
    readings += [record("drift", name, s, s, "relative") for s in (0, 5) for name in ("a", "total")]
    readings += [record("once", "x", 5, 1.0)]
    figures = {figure.key: figure for figure in trajectories(ReportData("x", None, readings))}
    assert figures.keys() == {"kl-nats", "walk-norm", "walk-ratio", "drift-relative"}
    drawn = [trace["name"] for trace in figures["kl-nats"].spec["data"]]
    assert drawn == [f"old/{n}" for n in range(12 - MOST, 12)]  # those that moved furthest
    assert f"{MOST} of 12" in figures["kl-nats"].caption
    assert [trace["name"] for trace in figures["drift-relative"].spec["data"]] == ["total"]


def test_ranks_and_blocks_are_drawn_by_layer():
    readings = [
        record(meter, f"layers.{n}", 5, 1.0 + n, "rank", "train", None)
        for meter in ("effective_rank", "stable_rank", "drift_block")
        for n in (10, 2)
    ]
    readings.append(record("drift", "layers.2.q", 5, 0.5, "relative", "train", None))
    from holdfast.report.figures import all_figures

    figures = {
        figure.key: figure.spec["data"] for figure in all_figures(ReportData("x", None, readings))
    }
    assert [trace["name"] for trace in figures["ranks"]] == ["effective rank", "stable rank"]
    assert figures["ranks"][0]["x"] == ["layers.2", "layers.10"]
    assert figures["ranks"][0]["y"] == [3.0, 11.0]
    assert figures["drift"][0]["x"] == ["layers.2", "layers.10"]


def test_a_page_of_one_model_lists_its_readings():
    readings = [record("canary", "web", 0, 2.5), record("loss", "total", 0, 1.0)]
    page = render_page(ReportData("x", None, readings, about="One model was read."))
    assert "One model was read." in page
    assert "2.500 ± 0.100" in page
    assert "All 1, first and last" in page
