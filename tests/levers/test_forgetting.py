"""The forgetting budget as a lever: what it reads, what it moves, when it gives up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_run import gpt2, tiny_run, weights

from holdfast.data.example import Role
from holdfast.data.stream import Stream
from holdfast.dual import RATE_LEAST, SHARE_LEAST, WEIGHT_MOST, Strengths
from holdfast.levers import Memory, ProbeContext
from holdfast.levers.budget import Budget
from holdfast.levers.forgetting import DOCUMENTS, PATIENCE, Forgetting, rises, warnings
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.meters import Reading


def reading(values: Mapping[str, float], name: str = "old", **options: Any) -> Reading:
    settings: dict[str, Any] = {"unit": "nats", "tags": ("canary",), "split": "selection"}
    mean = sum(values.values()) / len(values)
    return Reading(
        "canary",
        name,
        step=0,
        value=mean,
        stderr=None,
        n=len(values),
        items=dict(values),
        **settings | options,
    )


BASE = {f"d{i}": 2.0 + 0.1 * (i % 5) for i in range(20)}


def risen(by: float, spread: float = 0.0, **options: Any) -> Reading:
    """Every document's loss higher by `by` of the base's mean, give or take `spread`."""
    mean = sum(BASE.values()) / len(BASE)
    noise = np.random.default_rng(1).standard_normal(len(BASE))
    noise -= noise.mean()
    return reading(
        {i: v + mean * (by + spread * e) for (i, v), e in zip(BASE.items(), noise, strict=True)},
        **options,
    )


def check(lever: Forgetting, memory: Memory, now: Reading, **options: Any) -> ProbeContext:
    ctx = ProbeContext(5, before=[reading(BASE)], **{"held": True} | options)
    lever.after_probe([now], ctx, memory)
    return ctx


def test_a_rise_is_paired_and_counted_in_budgets() -> None:
    """Against numpy: mean of the differences over the margin, and its textbook standard error."""
    now = risen(0.02, spread=0.01)
    (found,) = rises([reading(BASE)], [now], {"canary": "1%"})
    change = np.array([now.items[i] - BASE[i] for i in BASE])
    margin = 0.01 * sum(BASE.values()) / len(BASE)
    assert found.value == pytest.approx(change.mean() / margin)
    assert found.value == pytest.approx(2.0)
    assert found.stderr == pytest.approx(change.std(ddof=1) / math.sqrt(len(BASE)) / margin)
    part = reading({i: now.items[i] for i in list(BASE)[:7]})
    (found,) = rises([reading(BASE)], [part], {"canary": "1%"})
    base = np.array(list(BASE.values())[:7])
    assert found.value == pytest.approx(change[:7].mean() / (0.01 * base.mean()))


def test_an_accuracy_falls_in_points() -> None:
    answers = {f"i{k}": 1.0 for k in range(50)}
    fallen = answers | {"i0": 0.0, "i1": 0.0}
    options: dict[str, Any] = {"name": "gsm8k", "unit": "accuracy", "tags": ()}
    before, now = reading(answers, **options), reading(fallen, **options)
    (found,) = rises([before], [now], {"gsm8k": "2pt"})
    assert found.value == pytest.approx(2.0)
    assert found.stderr > 0


@pytest.mark.parametrize(
    ("now", "budget"),
    [
        (risen(0.5, split="sealed"), {"canary": "1%"}),
        (risen(0.5, split="train"), {"canary": "1%"}),
        (risen(0.5, tags=("target",)), {"canary": "1%"}),
        (risen(0.5, name="another"), {"canary": "1%"}),
        (risen(0.5), {"gsm8k": "2pt"}),
        (risen(0.5), {"accuracy": "2pt"}),
    ],
)
def test_what_no_budget_names_or_the_gate_judges_is_not_looked_at(
    now: Reading, budget: dict[str, str]
) -> None:
    assert rises([reading(BASE), reading(BASE, split="sealed")], [now], budget) == []
    memory: Memory = {}
    check(Forgetting(budget=budget), memory, now)
    assert memory == {}


def test_a_key_that_nothing_falls_under_is_named() -> None:
    many = {f"d{i}": 2.0 for i in range(DOCUMENTS)}
    found = [reading(many), reading(BASE, name="gsm8k", unit="accuracy", tags=(), split="sealed")]
    (line,) = warnings(found, {"canary": "1%", "gsm8k": "2pt"})
    assert line.startswith("levers.forgetting.budget: gsm8k: not read while training")


def test_what_is_watched_by_few_texts_is_named() -> None:
    few = dict(list(BASE.items())[: DOCUMENTS - 1])
    found = [reading(few), reading(few, name="other", split="sealed"), reading(few, name="sums")]
    (line,) = warnings(found, {"canary": "1%"})
    assert f"few texts or items to watch: old ({len(few)}), sums ({len(few)}); by so few" in line
    assert warnings(found, {}) == []


def test_it_tightens_what_is_over_and_loosens_what_is_well_within() -> None:
    lever = Forgetting(budget="1%")
    over: Memory = {}
    ctx = check(lever, over, risen(0.03))
    assert lever.strengths(over).weight > 1
    assert "tightened" in over["moves"][0]
    assert "canary/old at 3.00" in over["moves"][0]
    assert ("worst_rise", "canary/old") in {noted[:2] for noted in ctx.noted}
    assert {noted[1] for noted in ctx.noted if noted[0] == "strength"} == {
        "weight",
        "share",
        "rate",
        "drawn_back",
    }
    under: Memory = {}
    check(lever, under, risen(0.001))
    assert lever.strengths(under).weight < 1
    still: Memory = {}
    check(lever, still, risen(0.007))
    assert lever.strengths(still) == Strengths()
    assert "moves" not in still


def test_noise_counts_against_the_run_but_does_not_move_it_alone() -> None:
    lever, memory = Forgetting(budget="1%"), Memory()
    check(lever, memory, risen(0.008, spread=0.02))
    assert lever.strengths(memory).weight > 1, "0.8 + 0.45 budgets may be over"
    memory = {}
    check(lever, memory, risen(0.003, spread=0.02))
    assert lever.strengths(memory) == Strengths(), "0.3 + 0.45 budgets is neither"


def test_while_the_rate_has_to_fall_more_is_allowed_and_nothing_is_loosened_for_it() -> None:
    lever, memory = Forgetting(budget="1%"), Memory()
    check(lever, memory, risen(0.03), to_fall=0.9)
    assert lever.strengths(memory) == Strengths()
    check(lever, memory, risen(0.03), to_fall=0.1)
    assert lever.strengths(memory).weight > 1


def test_late_in_the_run_what_is_over_is_drawn_back_and_believed_to_be() -> None:
    """sqrt(1.5 / 6) of the way; the rise is a quarter then, by the square."""
    lever, memory = Forgetting(budget="1%"), Memory()
    assert check(lever, memory, risen(0.06), to_fall=0.9).drawn_back == 1
    memory = {}
    ctx = check(lever, memory, risen(0.06), to_fall=0.25)
    assert ctx.drawn_back == pytest.approx(0.5, rel=1e-6)
    assert memory["levels"]["canary/old"][0] == pytest.approx(1.5)
    assert (
        memory["moves"][-1] == "step 5: canary/old at 6.00 budgets, drawn back to 50.0% of the way"
    )
    assert check(lever, {}, risen(0.014), to_fall=0.25).drawn_back == 1
    assert check(lever, {}, risen(0.06), to_fall=0.25, to_come=0.05).drawn_back == 1


def test_the_trainer_draws_back_what_a_lever_says(tmp_path: Path) -> None:
    """Against the same run without it: half of the displacement at that step."""

    class Back(Forgetting):
        def after_probe(self, readings: Any, ctx: ProbeContext, memory: Memory) -> None:
            ctx.drawn_back *= 0.5
            ctx.stop = "to be looked at"

    class Stop(Forgetting):
        def after_probe(self, readings: Any, ctx: ProbeContext, memory: Memory) -> None:
            ctx.stop = "to be looked at"

    runs = [
        tiny_run([lever], tmp_path / name, steps=8, every=2, meters=[lambda step: []])
        for name, lever in (("a", Back()), ("b", Stop()))
    ]
    before = weights(runs[0].model)
    for run in runs:
        run.train()
    half, whole = (weights(run.model) for run in runs)
    assert any(not before[name].equal(whole[name]) for name in before)
    for name, start in before.items():
        assert half[name].allclose(start + 0.5 * (whole[name] - start), atol=1e-7)


def test_a_lever_is_told_what_is_still_to_come(tmp_path: Path) -> None:
    """Of 8 steps, at each second one but the last, after which the whole model is read."""
    seen = []

    class Listen(Forgetting):
        def after_probe(self, readings: Any, ctx: ProbeContext, memory: Memory) -> None:
            seen.append((ctx.step, ctx.to_come, ctx.to_fall))

    tiny_run([Listen()], tmp_path, steps=8, every=2, meters=[lambda step: []]).train()
    assert [step for step, *_ in seen] == [2, 4, 6]
    assert [to_come for _, to_come, _ in seen] == pytest.approx([0.75, 0.5, 0.25])
    falls = [to_fall for *_, to_fall in seen]
    assert falls == sorted(falls, reverse=True)
    assert falls[-1] > 0


def test_a_loss_that_is_no_number_is_over_every_budget() -> None:
    lever, memory = Forgetting(budget="1%"), Memory()
    check(lever, memory, risen(math.nan))
    assert lever.strengths(memory).weight > 1
    assert json.loads(json.dumps(memory["levels"])) == {}


def test_it_gives_up_once_nothing_is_left_to_tighten_and_says_what_was_reached() -> None:
    lever, memory = Forgetting(budget="1%"), Memory()
    stops = []
    for _ in range(20):
        stops.append(check(lever, memory, risen(0.05), to_fall=0.1).stop)
        if stops[-1]:
            break
    reached = lever.strengths(memory)
    assert (reached.weight, reached.share, reached.rate) == pytest.approx(
        (WEIGHT_MOST, SHARE_LEAST, RATE_LEAST)
    )
    assert stops[-1] is not None
    assert "cannot be met" in stops[-1]
    assert stops[-1].count("budgets;") == len(stops) - 1, "a point of the frontier for each check"
    assert len(stops) >= PATIENCE + 6


def test_it_gives_up_soon_on_what_is_hopeless() -> None:
    lever, memory = Forgetting(budget="0.01%"), Memory()
    stops = [check(lever, memory, risen(0.05), to_fall=0.1).stop for _ in range(PATIENCE + 1)]
    assert stops[:-1] == [None] * PATIENCE, "the first one may yet be falling"
    assert "cannot be met" in str(stops[-1])


def test_it_does_not_give_up_while_a_rise_is_being_repaired() -> None:
    lever, memory = Forgetting(budget="0.01%"), Memory()
    for number in range(20):
        now = risen(0.5 * 0.8**number)
        assert check(lever, memory, now, to_fall=0.4).stop is None


@pytest.mark.parametrize(
    ("given", "budget"),
    [("1%", {"canary": "1%"}), ("2 pt", {"accuracy": "2pt"}), ({"a": "1.0%"}, {"a": "1%"})],
)
def test_a_budget_may_be_given_in_short(given: Any, budget: dict[str, str]) -> None:
    assert Forgetting(budget=given).budget == budget


@pytest.mark.parametrize(
    ("given", "said"), [("0%", "passes only models that improved"), (3, "3pt .* or 3%")]
)
def test_a_budget_that_nothing_can_meet_or_without_a_unit_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Forgetting(budget=given)


class Fixed(Forgetting):
    """Strengths as given, whatever is read."""

    factors: tuple[float, float, float]

    def strengths(self, memory: Memory) -> Strengths:
        return Strengths(*self.factors)


def test_the_weight_multiplies_every_term_but_the_lessons(tmp_path: Path) -> None:
    """As the anchor's own weight would."""
    rows = {"self_generated": {"rows": 8, "max_new_tokens": 12}}
    runs = [
        tiny_run([KlAnchor(weight=6.0, **rows)], tmp_path / "a"),
        tiny_run([Fixed(factors=(3, 1, 1)), KlAnchor(weight=2.0, **rows)], tmp_path / "b"),
    ]
    for run in runs:
        run.train()
    one, other = (weights(run.model) for run in runs)
    assert all(one[name].equal(other[name]) for name in one)


def test_the_step_size_is_multiplied_and_logged(tmp_path: Path) -> None:
    """As half of the learning rate would, but for the log's own rate."""
    kept: tuple[list[Reading], list[Reading]] = ([], [])
    runs = [
        tiny_run(
            [], tmp_path, model=gpt2(), record=kept[0].extend, arguments={"learning_rate": 5e-3}
        ),
        tiny_run([Fixed(factors=(1, 1, 0.5))], tmp_path, model=gpt2(), record=kept[1].extend),
    ]
    for run in runs:
        run.train()
    one, other = (weights(run.model) for run in runs)
    assert all(one[name].allclose(other[name], atol=1e-7) for name in one)
    rates = [[r.value for r in some if r.meter == "learning_rate"] for some in kept]
    assert rates[0] == pytest.approx(rates[1])


def test_the_lessons_share_moves_from_the_step_after_next(tmp_path: Path) -> None:
    from tiny_run import examples

    class Halved(Forgetting):
        def strengths(self, memory: Memory) -> Strengths:
            return Strengths(share=0.5 if memory.get("x") else 1.0)

        def after_probe(self, readings: Any, ctx: ProbeContext, memory: Memory) -> None:
            memory["x"] = 1.0

    old = Stream.of("old", Role.REPLAY, 0.5, examples(24, seed=3))
    trainer = tiny_run(
        [Halved(), Budget()], tmp_path, steps=8, streams=[old], every=2, meters=[lambda step: []]
    )
    trainer.train()
    assert trainer.mixture.schedule == [(3, 0.5)]
