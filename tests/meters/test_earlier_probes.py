"""What the stages before were judged by is judged again, and what they taught is to stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.artifact import RunFolder
from holdfast.errors import RequestError
from holdfast.meters.probes import load_items
from holdfast.recipe import Recipe, load_recipe

CODE = {"kind": "code", "tests": "assert f() == 1", "tags": ["guardrail"]}


def item(probe: str, number: int, tag: str, **more: Any) -> dict[str, Any]:
    """An item as a line of a probe file has it."""
    given = {"kind": "cloze", "prompt": f"{number} * {number} =", "target": f" {number**2}"}
    return given | {"id": str(number), "probe": probe, "tags": [tag]} | more


def write(file: Path, *items: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(one) + "\n" for one in items))
    return str(file)


@pytest.fixture
def stage(here: Path, finished_run: Path) -> Callable[..., Recipe]:
    """Recipes of a second stage, whose first one was judged by some items."""
    shutil.copytree(finished_run, here / "one")
    written = yaml.safe_load((here / "one" / "recipe.yaml").read_text())

    def made(
        *items: dict[str, Any], margins: dict[str, str] | None = None, **fields: Any
    ) -> Recipe:
        paths = [write(here / "first.jsonl", *items)] if items else []
        first = written | {"probes": paths, "gate": written["gate"] | {"margins": margins or {}}}
        (here / "one" / "recipe.yaml").write_text(yaml.safe_dump(first))
        return load_recipe(None, [], model="one", data="lesson.jsonl", **fields)

    return made


def test_what_was_taught_is_a_guardrail_and_all_else_is_as_it_was(
    stage: Callable[..., Recipe],
) -> None:
    tags = ("target", "guardrail", "rare", "adoption", "control", "recovery")
    recipe = stage(*(item(tag, 1, tag) for tag in tags))
    own, earlier, unasked = recipe.items()
    assert (own, unasked) == ([], [])
    expected = {tag: [tag] for tag in tags} | {"target": ["guardrail"]}
    assert {one.probe: one.tags for one in earlier} == expected


def test_a_probe_of_its_own_is_not_asked_twice(here: Path, stage: Callable[..., Recipe]) -> None:
    mine = write(here / "mine.jsonl", item("sums", 2, "target"))
    recipe = stage(item("sums", 1, "target"), item("old", 1, "guardrail"), probes=[mine])
    own, earlier, _ = recipe.items()
    assert [(one.probe, one.id, one.tags) for one in own] == [("sums", "2", ["target"])]
    assert [one.probe for one in earlier] == ["old"]


def test_code_is_run_only_where_that_is_asked_for(stage: Callable[..., Recipe]) -> None:
    items = (item("sums", 1, "guardrail"), item("functions", 1, "guardrail", **CODE))
    _, earlier, (line,) = stage(*items).items()
    assert [one.probe for one in earlier] == ["sums"]
    assert "'functions', which runs what it writes: not judged here" in line
    _, earlier, unasked = stage(*items, train={"run_generated_code": True}).items()
    assert ([one.probe for one in earlier], unasked) == (["sums", "functions"], [])


def test_they_are_found_where_a_run_was_moved_to(here: Path, stage: Callable[..., Recipe]) -> None:
    """A run that went on from another keeps that one's probes in its own folder."""
    stage()
    there, then = here / "one" / "recipe.yaml", str(here / "then" / "earlier_probes.jsonl")
    there.write_text(yaml.safe_dump(yaml.safe_load(there.read_text()) | {"probes": [then]}))
    kept = write(here / "one" / "earlier_probes.jsonl", item("sums", 1, "guardrail"))
    _, earlier, unasked = load_recipe(None, [], model="one", data="lesson.jsonl").items()
    assert ([one.probe for one in earlier], unasked) == (["sums"], [])
    assert load_recipe(there).probes == [kept]
    assert RunFolder.open(here / "one").read_recipe()["probes"] == [kept]


def test_margins_of_what_is_asked_again_go_on_unless_others_are_given(
    stage: Callable[..., Recipe],
) -> None:
    items = (item("sums_long", 1, "target"), item("old", 1, "guardrail"))
    then = {"sums": "5pt", "old": "7%", "canary": "4%", "elsewhere": "9pt"}
    carried = stage(*items, margins=then).gate.margins
    # a family's key; a percentage is no margin of an accuracy; the rest is not read again
    assert carried == {"probe/sums_long": "5pt"}
    assert stage(*items, margins=carried).gate.margins == carried
    assert stage(*items, margins=then, earlier_probes=False).gate.margins == {}
    for own in ({"sums_long": "1pt"}, {"accuracy": "1pt"}):
        assert stage(*items, margins=then, gate={"margins": own}).gate.margins == own
    with pytest.raises(RequestError, match=r"^model.path: the recipe.yaml of 'one': gate.margins"):
        stage(*items, margins={"sums": "much"})


def test_what_is_not_judged_is_told(here: Path, stage: Callable[..., Recipe]) -> None:
    recipe = stage(item("sums", 1, "target"))
    (here / "first.jsonl").unlink()
    _, earlier, (line,) = recipe.items()
    assert earlier == []
    assert "judged by" in line
    assert "first.jsonl, which is not there any more" in line
    _, _, (line,) = stage().items()
    assert line.startswith("no probe asks for what the model was taught before (")
    mine = write(here / "mine.jsonl", item("sums", 1, "guardrail"))
    assert stage(probes=[mine]).items()[2] == []
    assert stage(earlier_probes=False).items()[1:] == ([], [])


def test_the_canary_of_the_stage_before_goes_on_unless_another_is_named(
    here: Path, finished_run: Path, quick: list[str], holdfast: Callable[..., Any]
) -> None:
    shutil.copytree(finished_run, here / "one")
    text = write(here / "text.jsonl", {"text": "some old text", "domain": "old"})
    other = write(here / "other.jsonl", {"text": "other text"})
    written = yaml.safe_load((here / "one" / "recipe.yaml").read_text())
    written["canary"]["sources"] = [{"path": text, "domain": "old"}]
    (here / "one" / "recipe.yaml").write_text(yaml.safe_dump(written))

    def canary(**fields: Any) -> list[str]:
        recipe = load_recipe(None, [], model="one", data="lesson.jsonl", **fields)
        return [source.path for source in recipe.canary.sources]

    assert canary() == [text]
    assert canary(levers="none") == [text]
    assert canary(canary={"sources": [other]}) == [other]
    (here / "text.jsonl").unlink()
    assert canary() == []
    begun = ["train", "model=one", "data=lesson.jsonl", *quick]
    found = holdfast(*begun, "out=two")
    assert f"warning: canary.sources: '{text}', by which the stage before" in found.out, found.err
    named = holdfast(*begun, "out=three", f"canary.sources=[{other}]")
    assert "by which the stage before" not in named.out


def test_the_gate_of_a_third_stage_judges_what_the_first_one_taught(
    here: Path, quick: list[str], holdfast: Callable[..., Any]
) -> None:
    texts = ({"text": f"{n} stones lie by the sea", "domain": "prose"} for n in range(12))
    begun = ["data=lesson.jsonl", *(word for word in quick if "gate" not in word)]
    first = write(here / "first.jsonl", *(item("sums", n, "target") for n in range(20)))
    second = write(here / "second.jsonl", *(item("more", n, "target") for n in range(20)))
    canary = f"canary.sources=[{write(here / 'old.jsonl', *texts)}]"
    for model, probes, out in (("tiny", first, "one"), ("one", second, "two")):
        words = [f"model={model}", f"probes={probes}", f"out={out}", *begun]
        done = holdfast("train", *words, *([canary] if model == "tiny" else []))
        assert done.code in (0, 3, 4), done.err
    dry = holdfast("validate", "model=two", "gate.margins={sums: 5pt}", *begun)
    assert dry.code == 0, dry.err
    assert "probes of earlier stages: 40 items" in dry.out
    found = holdfast("train", "model=two", "gate.margins={sums: 5pt}", "out=three", *begun)
    assert found.code in (0, 3, 4), found.err
    assert "judging what was judged before: more 2pt, sums 5pt (40 items)" in found.out
    assert "canary: that of the stage before: " in found.out
    kept = load_items([str(here / "three" / "earlier_probes.jsonl")])
    assert {(one.probe, *one.tags) for one in kept} == {
        ("sums", "guardrail"),
        ("more", "guardrail"),
    }
    rows = json.loads((here / "three" / "verdict.json").read_text())["rows"]
    judged = {row["name"]: (row["kind"], row["margin"]) for row in rows if row["meter"] == "probe"}
    assert judged.keys() == {"sums", "more"}
    assert "prose" in {row["name"] for row in rows if row["meter"] == "canary"}
    assert {kind for kind, _ in judged.values()} == {"guardrail"}
    again = holdfast("train", "--resume", "--out", "three")
    assert again.code == found.code, again.err
    assert json.loads((here / "three" / "verdict.json").read_text())["rows"] == rows
