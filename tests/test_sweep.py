"""A sweep: what it optimises, when it gives up a trial, that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast import run
from holdfast.cli import main
from holdfast.errors import RequestError
from holdfast.gate.verdict import Gate
from holdfast.meters import Reading, Split
from holdfast.recipe import Recipe, load_recipe
from holdfast.space import parse_axes
from holdfast.sweep import HOPELESS, Swept, Trial, dominated, frontier, scored, sweep

pytest.importorskip("optuna")
AXES = parse_axes(["levers.kl_anchor.weight=1:100:log", "train.steps=[10, 20]"])


def canary(loss: float, split: Split = "selection") -> Reading:
    items = {f"d{i}": loss + 0.01 * i for i in range(12)}
    mean = sum(items.values()) / 12
    return Reading("canary", "old", split, 0, mean, 0.0, 12, "nats", tags=("canary",), items=items)


def lesson(loss: float) -> Reading:
    items = {"r0": loss, "r1": loss}
    tags = ("target",)
    return Reading(
        "lesson", "heldout", "selection", 0, loss, 0.0, 2, "nats", tags=tags, items=items
    )


Watch = Callable[[list[Reading], list[Reading], float], None]
BEFORE = [canary(2.0), canary(2.0, "sealed")]


def pretend(recipe: Recipe, watch: Watch) -> None:
    """A lesson that is learned at 1 / weight, for a rise of 2 / weight margins; twice as high at
    half of the steps.
    """
    weight = recipe.levers.kl_anchor.weight
    rise = 0.01 * 2.055 * 2 / weight
    for done in (0.25, 0.5, 0.75, 1.0):
        early = 2 if done < 1 else 1
        watch(BEFORE, [canary(2.0 + early * rise), lesson(3.0 - 1 / weight)], done)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Weights of the trials that were run."""
    seen: list[float] = []

    def train(recipe: Recipe, *, watch: Watch) -> None:
        Path(recipe.out).mkdir(parents=True)
        seen.append(recipe.levers.kl_anchor.weight)
        pretend(recipe, watch)

    monkeypatch.setattr(run, "train", train)
    return seen


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: base\ndata: lesson.jsonl\ngate: {margins: {canary: 1%, gsm8k: 2pt}}\n")
    return path


def test_it_recommends_the_most_target_within_the_margin(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    """Any weight above 2 is: the smallest that was drawn."""
    found = sweep(recipe, ["seed=3"], AXES, tmp_path / "out", trials=12)
    assert len(found.trials) + found.pruned == 12 == len(pretended)
    kept = [w for w in pretended if w > 2]
    assert found.recommended is not None
    assert found.recommended.settings["levers.kl_anchor.weight"] == min(kept)
    for one in found.trials:
        weight = one.settings["levers.kl_anchor.weight"]
        assert one.target == pytest.approx(1 / weight - 3)
        assert one.worst == pytest.approx(2 / weight, rel=1e-6)
        assert one.culprit == "canary/old"
    assert list(found.frontier) == sorted(found.frontier, key=lambda one: one.target)
    assert not list((tmp_path / "out").glob("trial-*")), "no run is left"
    recommended = load_recipe(tmp_path / "out" / "recommended.yaml")
    assert recommended.levers.kl_anchor.weight == min(kept)
    assert recommended.seed == 3
    written = sorted(path.name for path in (tmp_path / "out" / "recipes").iterdir())
    assert written == sorted(f"trial-{one.number}.yaml" for one in found.frontier)
    points = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert sum(point["recommended"] for point in points) == 1
    assert "plotly" in (tmp_path / "out" / "frontier.html").read_text()


def test_it_goes_on_where_it_stopped_as_if_it_had_not(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    sweep(recipe, [], AXES, tmp_path / "whole", trials=9)
    whole, pretended[:] = list(pretended), []
    sweep(recipe, [], AXES, tmp_path / "parts", trials=4)
    found = sweep(recipe, [], AXES, tmp_path / "parts", trials=9)
    assert pretended == whole
    assert len(found.trials) + found.pruned == 9
    pretended.clear()
    sweep(recipe, [], AXES, tmp_path / "parts", trials=9)
    assert pretended == []
    pretended.clear()
    sweep(recipe, [], AXES, tmp_path / "other", trials=9, seed=1)
    assert pretended != whole


def test_another_search_does_not_join_a_study(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    sweep(recipe, [], AXES, tmp_path / "a", trials=1, storage=url)
    sweep(recipe, [], AXES, tmp_path / "b", trials=2, storage=url)
    assert len(pretended) == 2, "two machines, one study"
    for words, axes in ((["seed=9"], AXES), ([], AXES[:1])):
        with pytest.raises(RequestError, match="another recipe or other settings"):
            sweep(recipe, words, axes, tmp_path / "c", trials=3, storage=url)


def test_no_trial_begins_that_would_end_too_late(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    found = sweep(recipe, [], AXES, tmp_path / "out", trials=5, minutes=0.0)
    assert pretended == []
    assert found == Swept((), (), None, 0, found.seconds)


def test_what_is_refused_is_refused_before_a_trial(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    axes = parse_axes(["levers.kl_anchor.weight=-3:1", "levers.nothing.x=1:2"])
    with pytest.raises(RequestError) as refused:
        sweep(recipe, [], axes, tmp_path / "out")
    assert len(refused.value.problems) == 2
    assert "levers.kl_anchor.weight: -3" in refused.value.problems[0]
    assert "levers.nothing" in refused.value.problems[1]
    with pytest.raises(RequestError, match="--storage: the database cannot be used"):
        sweep(recipe, [], AXES, tmp_path / "out", storage="nosuch://x")
    assert pretended == []


def test_without_optuna_one_line_says_what_to_install(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RequestError, match=r"pip install 'holdfast\[sweep\]'"):
        sweep(recipe, [], AXES, tmp_path / "out")


def test_a_hopeless_trial_is_given_up_at_half_of_its_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[float] = []

    def train(recipe: Recipe, *, watch: Watch) -> None:
        for done in (0.25, 0.5, 0.75, 1.0):
            reached.append(done)
            watch(BEFORE, [canary(2.0 * (1 + 0.011 * HOPELESS)), lesson(3.0)], done)

    monkeypatch.setattr(run, "train", train)
    found = sweep(recipe, [], AXES, tmp_path / "out", trials=2)
    assert (found.pruned, found.trials, found.recommended) == (2, (), None)
    assert reached == [0.25, 0.5] * 2


def test_a_dominated_trial_is_given_up(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0, 0.5])

    def train(recipe: Recipe, *, watch: Watch) -> None:
        loss = next(losses)
        watch(BEFORE, [canary(2.0 + 0.001 * loss), lesson(loss)], 0.5)
        watch(BEFORE, [canary(2.0 + 0.001 * loss), lesson(loss)], 1.0)

    monkeypatch.setattr(run, "train", train)
    found = sweep(recipe, [], AXES, tmp_path / "out", trials=3)
    assert [one.number for one in found.trials] == [0, 2]
    assert found.pruned == 1


def test_targets_that_are_answered_count_before_the_lessons_loss() -> None:
    answers = {"a": 1.0, "b": 0.0}
    options: dict[str, Any] = {"unit": "accuracy", "tags": ("target",), "items": answers}
    probe = Reading("probe", "verbs", "selection", 0, 0.5, 0.1, 2, **options)
    found = scored(BEFORE, [canary(2.02), lesson(1.0), probe], Gate(margins={"canary": "2%"}))
    assert found == (0.5, pytest.approx(0.02 / (0.02 * 2.055)), "canary/old")
    with pytest.raises(RequestError, match="nothing to search by"):
        scored(BEFORE, [canary(2.02)], Gate())


def test_from_the_command_line_on_a_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two trials of three steps, pictures and recipes included; the recommended recipe trains."""
    tiny.save(tmp_path / "base", tiny.tiny("Llama"), tiny.letters())
    lesson = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(40)]
    tiny.jsonl(tmp_path / "lesson.jsonl", lesson)
    prose = [
        {"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(16)
    ]
    tiny.jsonl(tmp_path / "prose.jsonl", prose)
    out = tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path / 'base'}\n"
        f"data: {{sources: [{tmp_path / 'lesson.jsonl'}], max_length: 24}}\n"
        f"canary: {{sources: [{tmp_path / 'prose.jsonl'}]}}\n"
        "train: {steps: 3, batch_tokens: 128, measure_every: 2}\n"
        "levers: {kl_anchor: {self_generated: {rows: 4, max_new_tokens: 8}}}\n"
    )
    words = ["sweep", str(tmp_path / "recipe.yaml"), "--forget", "90%", "--trials", "2"]
    words += ["--over", "levers.budget.learning_rate=1e-4:1e-3:log", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trials"] + found["pruned"] == 2
    assert found["recommended"]["worst"] < 1
    recommended = load_recipe(out / "recommended.yaml")
    assert recommended.gate.margins == {"canary": "90%"}
    assert 1e-4 <= float(recommended.levers.budget.learning_rate) <= 1e-3
    assert main(words) == 0, "nothing is left to run"
    assert "recommended" in capsys.readouterr().out
    assert main(["sweep", str(tmp_path / "recipe.yaml"), "--out", str(out)]) == 2


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    """Against the definition, by brute force."""
    trials = [Trial(n, {}, t, w, "") for n, (t, w) in enumerate(points)]
    best = {one.number for one in frontier(trials)}
    for n, (target, worst) in enumerate(points):
        beaten = any(t >= target and w <= worst and (t > target or w < worst) for t, w in points)
        assert (n not in best) == beaten
        strictly = any(t > target and w < worst for t, w in points)
        assert dominated((target, worst), points) == strictly


def test_a_folder_of_someone_elses_is_left_alone(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "project" / "recipes" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("model: base\n")
    with pytest.raises(RequestError, match="is not empty and no sweep wrote it"):
        sweep(recipe, [], AXES, tmp_path / "project", trials=1)
    assert mine.read_text() == "model: base\n"
    assert pretended == []


def test_a_written_recipe_means_what_its_trial_was(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    """An end of an axis that is also the default: the automatic adapter is the same either way."""
    axes = parse_axes(["levers.adapter.target=[mlp, all-linear]"])
    sweep(recipe, ["levers.kl_anchor.weight=3"], axes, tmp_path / "out", trials=6)
    written = [load_recipe(path) for path in (tmp_path / "out" / "recipes").iterdir()]
    for found in written:
        asked = load_recipe(recipe, [f"levers.adapter.target={found.levers.adapter.target}"])
        assert found.levers.adapter.settled(10) == asked.levers.adapter.settled(10)


def test_a_recipe_of_the_frontier_is_one(
    pretended: list[float], recipe: Path, tmp_path: Path
) -> None:
    sweep(recipe, [], AXES, tmp_path / "out", trials=2)
    for path in (tmp_path / "out" / "recipes").iterdir():
        assert path.read_text().startswith("# trial ")
        assert yaml.safe_load(path.read_text())["gate"]["margins"] == {
            "canary": "1%",
            "gsm8k": "2pt",
        }
