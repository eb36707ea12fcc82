"""A recipe's three sources, its shorthands, and that it survives being written and read."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import RequestError
from holdfast.levers import levers
from holdfast.recipe import Recipe, load_recipe

BASIC: dict[str, Any] = {"model": "base", "data": "lesson.jsonl"}


def recipe(*words: str, **fields: Any) -> Recipe:
    return load_recipe(words=words, **{**BASIC, **fields})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {path: from-file, dtype: bfloat16}\n"
        "data: from-file.jsonl\n"
        "out: from-file\n"
        "seed: 1\n"
        "train: {epochs: 1, batch_tokens: 512}\n"
    )
    return path


def test_the_file_alone(file: Path) -> None:
    loaded = load_recipe(file)
    assert (loaded.model.path, loaded.out, loaded.seed) == ("from-file", "from-file", 1)
    assert [source.path for source in loaded.data.sources] == ["from-file.jsonl"]


def test_words_win_over_the_file_and_keywords_over_words(file: Path) -> None:
    loaded = load_recipe(file, ["seed=2", "out=word", "train.epochs=2"], out="keyword")
    assert (loaded.seed, loaded.out, loaded.train.epochs) == (2, "keyword", 2.0)
    assert loaded.train.batch_tokens == 512, "what a word does not name stays"


def test_a_later_word_wins_over_an_earlier_one(file: Path) -> None:
    assert load_recipe(file, ["seed=2", "seed=3"]).seed == 3


def test_a_keyword_of_none_is_not_given(file: Path) -> None:
    assert load_recipe(file, out=None).out == "from-file"


def test_a_plain_model_or_lesson_keeps_what_else_its_section_holds(file: Path) -> None:
    loaded = load_recipe(file, ["data.heldout=0.1"], model="keyword", data="keyword.jsonl")
    assert (loaded.model.path, loaded.model.dtype) == ("keyword", "bfloat16")
    assert [source.path for source in loaded.data.sources] == ["keyword.jsonl"]
    assert loaded.data.heldout == 0.1


def test_a_whole_section_replaces_the_one_before_it(file: Path) -> None:
    assert load_recipe(file, model={"path": "keyword"}).model.dtype == "auto"


def test_a_field_of_a_section_given_in_short() -> None:
    words = ["model=base", "model.dtype=float32", "data=[a, b]", "data.heldout=0"]
    loaded = load_recipe(words=words)
    assert (loaded.model.path, loaded.model.dtype) == ("base", "float32")
    assert [source.path for source in loaded.data.sources] == ["a", "b"]


@pytest.mark.parametrize("word", ["none", "off", "None", "false"])
def test_a_word_turns_one_lever_off(word: str) -> None:
    loaded = recipe(f"levers.kl_anchor={word}")
    assert loaded.levers.kl_anchor.weight == 0
    assert not loaded.levers.adapter.off, "the others stay as they are"


@pytest.mark.parametrize("word", ["none", "off", "false"])
def test_a_word_turns_all_levers_off(word: str) -> None:
    loaded = recipe(f"levers={word}").levers
    for key, lever in levers().items():
        assert getattr(loaded, key) == lever(**lever.OFF)
    assert loaded.adapter.off
    assert loaded.replay.off


def test_a_lever_that_was_turned_off_can_be_turned_on_again() -> None:
    loaded = recipe("levers=none", "levers.adapter.r=4").levers
    assert (loaded.adapter.off, loaded.adapter.r) == (False, 4)
    assert loaded.kl_anchor.weight == 0, "the others stay off"


def test_words_that_other_yaml_readers_take_for_booleans(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{model: on, data: no, levers: {kl_anchor: {on: both}, replay: off}}")
    loaded = load_recipe(path, ["levers.budget.learning_rate=1e-4", "gate.enabled=no"])
    assert (loaded.model.path, loaded.data.sources[0].path) == ("on", "no")
    assert loaded.levers.kl_anchor.on == "both"
    assert loaded.levers.replay.off
    assert loaded.levers.budget.learning_rate == 1e-4
    assert loaded.gate.enabled is False


def test_what_a_run_was_resolved_with_is_not_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: base\ndata: lesson.jsonl\nresolved: {steps: 3}\n")
    assert load_recipe(path) == recipe()


def test_a_recipe_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().seed = 1  # type: ignore[misc]


def test_all_problems_are_reported_wherever_they_were_given(file: Path) -> None:
    file.write_text(file.read_text() + "gate: {alpha: 2}\n")
    with pytest.raises(RequestError) as caught:
        load_recipe(file, ["seed", "train.epochs=0", "train.epoch=1"])
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "'seed': give settings as key=value" in problems
    assert f"{file}: gate.alpha: 2" in problems
    assert "\ntrain.epochs: 0" in problems, "a word's problem is not laid to the file"
    assert "\ntrain.epoch: unknown key" in problems


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=8)
"""Any text but with line breaks that PyYAML writes unescaped and then reads as spaces."""

OVERRIDES: dict[str, st.SearchStrategy[Any]] = {
    "out": st.text("abc/é :#-'\"", min_size=1),
    "seed": st.integers(0, 2**32 - 1),
    "data.heldout": st.floats(0, 0.49),
    "data.max_length": st.none() | st.integers(16, 10**6),
    "model.dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "model.chat_template": st.none() | NAMES,
    "train.epochs": st.floats(1e-6, 1e6),
    "train.steps": st.none() | st.integers(1, 10**9),
    "train.report_to": st.lists(st.sampled_from(["tensorboard", "wandb"])),
    "levers.adapter.method": st.sampled_from(["none", "lora", "oft"]),
    "levers.adapter.target": st.sampled_from(["mlp", "all-linear", ["up_proj", "down_proj"]]),
    "levers.adapter.config": st.dictionaries(NAMES, st.booleans() | st.integers()),
    "levers.budget.learning_rate": st.just("auto") | st.floats(1e-9, 1),
    "levers.budget.cap": st.none() | st.floats(1e-6, 1),
    "levers.kl_anchor.weight": st.floats(0, 1e3),
    "levers.kl_anchor.self_generated.fraction": st.floats(0, 0.4),
    "levers.replay.sources": st.lists(st.just("replay.jsonl") | st.just({"path": "a", "limit": 3})),
    "levers.replay.fraction": st.floats(0, 0.4),
    "canary.sources": st.lists(st.just({"path": "canary.jsonl", "domain": "no"})),
    "probes": st.lists(NAMES),
    "gate.margins": st.dictionaries(NAMES, st.sampled_from(["2pt", "0.5%"])),
    "gate.target": st.sampled_from(["rise", "report"]),
}


@settings(deadline=None)
@given(chosen=st.fixed_dictionaries({}, optional=OVERRIDES))
def test_any_recipe_survives_yaml(chosen: dict[str, Any]) -> None:
    words = [f"{key}={yaml.safe_dump(value)}" for key, value in chosen.items()]
    loaded = recipe("levers.replay.loss=ntp", *words)  # kl would need an anchor
    text = yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert Recipe.model_validate(yaml.safe_load(text)) == loaded


def test_a_forgetting_budget_is_a_lever_and_sets_the_gates_margins() -> None:
    words = ["budget.forgetting={canary: 1%, gsm8k: 2pt}", "gate.margins.gsm8k=3pt"]
    recipe = load_recipe(None, words, model="base", data="lesson.jsonl")
    assert recipe.levers.forgetting.budget == {"canary": "1%", "gsm8k": "2pt"}
    assert recipe.gate.margins == {"canary": "1%", "gsm8k": "3pt"}
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize("levers", [{}, {"levers": "none"}, {"levers": {"forgetting": "none"}}])
def test_a_budget_in_short_is_the_same_budget(levers: dict[str, Any]) -> None:
    given = {"model": "base", "data": "lesson.jsonl", "budget": {"forgetting": "1%"}, **levers}
    copied = deepcopy(given)
    assert Recipe.model_validate(given).levers.forgetting.budget == {"canary": "1%"}
    assert given == copied, "what was handed in stays as it was"


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"forgetting": "0%"}, "levers.forgetting.budget.canary: .* passes only models that impr"),
        ({"forgetting": 3}, "levers.forgetting.budget: 3 .* 3pt"),
        ({"learning_rate": 1}, "budget: .* for the step's budget give levers.budget"),
        ("1%", "budget: unknown key"),
    ],
)
def test_a_budget_that_is_none_says_how_to_give_one(budget: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        load_recipe(None, model="base", data="lesson.jsonl", budget=budget)
