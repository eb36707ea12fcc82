"""A whole run: repeatable, resumable after any crash, refused without a trace."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import tiny
from holdfast import model as models
from holdfast import run, trainer
from holdfast.choice import FALL, GAIN
from holdfast.data.example import Role
from holdfast.data.stream import Line
from holdfast.errors import RequestError
from holdfast.gate.readings import judge_run
from holdfast.meters.canary import document
from holdfast.prepare import Prepared, canary_documents, load, prepare, split_heldout
from holdfast.recipe import Recipe, load_recipe
from holdfast.reference.frozen import Frozen
from holdfast.reference.remembered import Remembered

STEPS = 6
QUIET = Console(quiet=True)
PROBES = [
    {"id": "1", "probe": "sums", "kind": "nll", "prompt": "70 + 1 =", "target": " 71."},
    {"id": "2", "probe": "sums", "kind": "nll", "prompt": "71 + 1 =", "target": " 72."},
    {"id": "1", "probe": "words", "kind": "exact", "prompt": "a", "target": "b", "stop": ["."]},
]
PROSE = [{"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(16)]
CODE = [{"text": f"x{n} = {n} + {n * n}", "domain": "code"} for n in range(12)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a lesson, canary texts of two domains and probes."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "base", tiny.tiny("Llama"), tiny.letters())
    lesson = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(40)]
    for name, rows in (("lesson", lesson), ("prose", PROSE), ("code", CODE), ("probes", PROBES)):
        tiny.jsonl(folder / f"{name}.jsonl", rows)
    return folder


def recipe_of(inputs: Path, out: Path, **changes: Any) -> Recipe:
    fields = {
        "model": str(inputs / "base"),
        "data": {"sources": [str(inputs / "lesson.jsonl")], "max_length": 24},
        "out": str(out),
        "train": {
            "steps": STEPS,
            "batch_tokens": 128,
            "micro_batch_tokens": 64,
            "save_every": 2,
            "measure_every": 2,
        },
        "levers": {
            "adapter": {"r": 2},
            "kl_anchor": {"self_generated": {"rows": 4, "max_new_tokens": 8}},
            "budget": {"learning_rate": 0.01},
        },
        "canary": {"sources": [str(inputs / "prose.jsonl"), str(inputs / "code.jsonl")]},
        "probes": [str(inputs / "probes.jsonl")],
        "alarms": {"every": 1},
    }
    return load_recipe(**fields | changes)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, and that warned of nothing."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.train(recipe_of(inputs, out))
    assert [str(warning.message) for warning in seen] == []
    return out


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def readings(folder: Path) -> dict[tuple[Any, ...], float]:
    """Value by step, meter, name and split; each must be there exactly once."""
    lines = [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]
    keys = [(r["step"], r["meter"], r["name"], r["split"]) for r in lines]
    assert not [key for key, count in Counter(keys).items() if count > 1]
    return dict(zip(keys, (r["value"] for r in lines), strict=True))


def verdict(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "verdict.json").read_text())
    del found["summary"]["seconds"], found["summary"]["seconds_checking"]
    del found["sha256"]["readings.jsonl"]  # they have seconds in them, too
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Prepared]:
    """What each run had prepared, noted as its artifact is saved."""
    found: list[Prepared] = []
    save = run._save_artifact

    def note(prepared: Prepared, *args: Any) -> None:
        found.append(prepared)
        save(prepared, *args)

    monkeypatch.setattr(run, "_save_artifact", note)
    return found


# ---- the same again


def test_the_same_recipe_gives_the_same_weights_bit_for_bit(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    torch.rand(3)  # whatever the global generators have seen
    run.train(recipe_of(inputs, tmp_path / "run"))
    assert weights(tmp_path / "run") == weights(whole)
    assert readings(tmp_path / "run") == readings(whole)
    assert verdict(tmp_path / "run") == verdict(whole)
    halfway = whole / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    assert weights(whole) != halfway.read_bytes()


KILLER = """
import os, random, signal, sys
from pathlib import Path
import datasets, peft, transformers
import transformers.models.llama.modeling_llama
from holdfast import run, trainer
from holdfast.artifact import RunFolder
from holdfast.recipe import load_recipe

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(owner, name, when=lambda *args: True):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        result = inner(*args, **kwargs)
        if when(*args):
            die()
        return result
    setattr(owner, name, outer)

def at_step(step):
    return lambda folder, readings: readings[0].step == step

POINTS = {
    "anchors": lambda: after(run, "prepare"),
    "base_read": lambda: after(RunFolder, "merge"),
    "step_1": lambda: after(RunFolder, "append", at_step(1)),
    "some_step": lambda: after(RunFolder, "append", at_step(random.randint(2, 6))),
    "checkpoint_4": lambda: after(
        transformers.Trainer, "_save_checkpoint", lambda self, *_: self.state.global_step == 4
    ),
    "artifact": lambda: after(run, "_save_artifact"),
    "verdict": lambda: after(run, "decide"),
}
for point in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        POINTS[point]()
        run.train(load_recipe(Path(sys.argv[1]) / f"{point}.yaml"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(point, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived")
"""
"""Runs recipes in processes of their own, each killed at a point of its own: no handler, no
farewell, as when the machine is taken away."""
POINTS = ["anchors", "base_read", "step_1", "some_step", "checkpoint_4", "artifact", "verdict"]


@pytest.fixture(scope="module")
def killed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    for point in POINTS:
        recipe = recipe_of(inputs, folder / point)
        (folder / f"{point}.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), *POINTS],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:-1] == [f"{point} {signal.SIGKILL:d}" for point in POINTS]
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    inputs: Path, whole: Path, killed: Path, point: str
) -> None:
    out = killed / point
    assert not (out / "verdict.json").exists()
    run.train(recipe_of(inputs, out), resume=True)
    assert weights(out) == weights(whole)
    assert readings(out) == readings(whole)
    assert verdict(out) == verdict(whole)
    assert (out / "alarms.jsonl").read_bytes() == (whole / "alarms.jsonl").read_bytes()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_a_finished_run_resumed_again_changes_nothing(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    result = run.train(recipe_of(inputs, out), resume=True)
    assert result.summary["steps"] == STEPS
    assert weights(out) == weights(whole)
    assert readings(out) == readings(whole)
    assert verdict(out) == verdict(whole)
    now, then = contents(out), contents(whole)
    same = {name for name in then if name.startswith(("data/", "checkpoints/"))}
    assert same
    assert {name: now[name] for name in same} == {name: then[name] for name in same}
    assert now.keys() == then.keys()


# ---- never with something else


def another_lesson(inputs: Path) -> None:
    with (inputs / "lesson.jsonl").open("a") as file:
        file.write('{"prompt": "9 + 9 =", "completion": " 18."}\n')


def another_base(inputs: Path) -> None:
    file = inputs / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def other_canary(inputs: Path) -> None:
    tiny.jsonl(inputs / "code.jsonl", CODE[1:])


def other_probes(inputs: Path) -> None:
    tiny.jsonl(inputs / "probes.jsonl", PROBES[1:])


@pytest.mark.parametrize(
    ("change", "fields", "named"),
    [
        (another_lesson, {}, ["data_fingerprint"]),
        (another_base, {}, ["weights_sha256"]),
        (other_canary, {}, ["canary_fingerprint"]),
        (other_probes, {}, ["probes_sha256"]),
        (None, {"seed": 5}, ["seed was 0 when", "is 5 now"]),
        (None, {"levers": {"kl_anchor": {"weight": 3.0}}}, ["levers.kl_anchor.weight was auto"]),
        (None, {"levers": "none"}, ["levers.adapter.method was lora", "is none now"]),
        (None, {"gate": {"enabled": False}}, ["gate.enabled was True"]),
    ],
)
def test_resuming_with_something_else_is_refused_and_changes_nothing(
    inputs: Path, whole: Path, tmp_path: Path, change: Any, fields: Any, named: list[str]
) -> None:
    mine = shutil.copytree(inputs, tmp_path / "inputs")
    out = shutil.copytree(whole, tmp_path / "run")
    recipe = recipe_of(inputs, out)
    then = json.dumps(recipe.model_dump(mode="json"))
    text = (out / "recipe.yaml").read_text().replace(str(inputs), str(mine))
    (out / "recipe.yaml").write_text(text)
    recipe = Recipe.model_validate(json.loads(then.replace(str(inputs), str(mine))) | fields)
    if change:
        change(mine)
    before = contents(out)
    with pytest.raises(RequestError) as caught:
        run.train(recipe, resume=True)
    assert all(part in str(caught.value) for part in named)
    assert all(line.startswith("--resume: ") for line in caught.value.problems)
    assert contents(out) == before


def test_resuming_what_is_no_run_is_refused(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: tiny\n")
    with pytest.raises(RequestError, match="not written by a run"):
        run.train(recipe_of(inputs, tmp_path / "run"), resume=True)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "model: tiny\n"


# ---- refused without a trace


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"levers": {"adapter": {"method": "lorra"}}}, "did you mean 'lora'"),
        ({"levers": {"adapter": {"target": ["nothing"]}}}, "peft refuses these settings"),
        ({"levers": {"adapter": {"target": ["lm_head"]}}}, "head cannot carry an adapter"),
        ({"canary": {"sources": ["none.jsonl"]}}, "none.jsonl"),
        ({"model": "nowhere/at/all"}, "does not exist"),
        ({"probes": ["none.jsonl"]}, "does not exist"),
        ({"train": {"report_to": ["tensorbord"]}}, "did you mean 'tensorboard'"),
        (
            {"train": {"report_to": ["comet_ml", "dvclive"]}},
            "'(comet_ml|dvclive)' is not installed",
        ),
    ],
)
def test_a_refused_request_leaves_no_folder_behind(
    inputs: Path, tmp_path: Path, fields: Any, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        run.train(recipe_of(inputs, tmp_path / "run", **fields))
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused_without_a_trace(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="one process on one device, and 2 were started"):
        run.train(recipe_of(inputs, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_one_accelerator_trains_however_many_there_are(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would spread a step over all that it sees."""
    two = property(lambda args: args._n_gpu or 2)
    monkeypatch.setattr(TrainingArguments, "n_gpu", two)
    run.train(recipe_of(inputs, tmp_path / "run"))
    assert weights(tmp_path / "run") == weights(whole)


def test_a_folder_in_use_is_refused_and_left_alone(inputs: Path, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(RequestError, match="is not empty; give --resume"):
        run.train(recipe_of(inputs, whole))
    assert contents(whole) == before


# ---- which checkpoint is kept


def chosen_run(inputs: Path, out: Path, method: str = "lora", **train: Any) -> Recipe:
    """Every step is a checkpoint."""
    recipe = recipe_of(inputs, out)
    adapter = {"method": method, "r": 2} if method == "lora" else {"method": method}
    levers = recipe.levers.model_dump() | {"adapter": adapter}
    train = {**recipe.train.model_dump(), "save_every": 1, **train}
    return recipe_of(inputs, out, train=train, levers=levers)


def scored(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Checkpoints have these scores, one after the other."""
    given = iter(scores)
    monkeypatch.setattr(trainer, "score", lambda *_: next(given))


@pytest.mark.parametrize("method", ["lora", "none"])
def test_the_best_checkpoint_is_the_artifact_and_is_not_overwritten(
    inputs: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, -3.0, 0.5, -math.inf, 0.5, 0.4, -1.5)
    recipe = chosen_run(inputs, tmp_path / "run", method)
    result = run.train(recipe)
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"checkpoint-2", "checkpoint-5", "checkpoint-6"}
    name = "adapter/adapter_model" if method == "lora" else "model/model"
    ours = load_file(tmp_path / "run" / f"{name}.safetensors")
    there = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    theirs = load_file(there / f"{name.partition('/')[2]}.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert result.summary["steps"] == STEPS
    assert result.summary["kept"].startswith("step 2 of 6: ")
    assert {key[0] for key in readings(tmp_path / "run") if key[1] == "probe"} == {0, 2}
    assert "step 2 of 6" in (tmp_path / "run" / "README.md").read_text()
    # resumed when it is over, it keeps the same one
    then = contents(tmp_path / "run" / name.partition("/")[0])
    assert run.train(recipe, resume=True).summary["kept"] == result.summary["kept"]
    assert contents(tmp_path / "run" / name.partition("/")[0]) == then


def test_patience_counts_checkpoints_that_are_not_better(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, 0.1, 0.0, 0.2, 0.2, -2.0)
    recipe = chosen_run(inputs, tmp_path / "run", patience=2)
    for resume in (False, True):
        result = run.train(recipe, resume=resume)
        assert result.summary["steps"] == 5
        assert result.summary["stopped"].startswith("train.patience: ")
        assert result.summary["kept"].startswith("step 3 of 5: ")


def test_the_last_is_kept_where_that_is_asked(inputs: Path, tmp_path: Path) -> None:
    result = run.train(chosen_run(inputs, tmp_path / "run", keep="last"))
    assert result.summary["kept"] == "step 6, the last"
    assert not {key for key in readings(tmp_path / "run") if key[1] in (GAIN, FALL)}
    with pytest.raises(RequestError, match=r"train.patience: .* set train.keep: best"):
        chosen_run(inputs, tmp_path / "no", keep="last", patience=1)


# ---- what is measured


def test_all_is_measured_before_and_after(whole: Path) -> None:
    """Canary by domain on both splits, held-out lesson rows and probes on the sealed one."""
    found = readings(whole)
    canary = {(domain, split) for domain in ("prose", "code") for split in ("selection", "sealed")}
    both = {
        *((meter, *one) for meter in ("canary", "canary_bits") for one in canary),
        ("lesson", "heldout", "selection"),
        ("lesson", "heldout", "sealed"),
        ("probe", "sums", "sealed"),
        ("probe", "words", "sealed"),
    }
    of_two = {
        *(("canary_rise", *one) for one in canary),
        *(("kl", name, "sealed") for name in ("old/prose", "old/code", "new/heldout")),
    }
    for step, wanted in ((0, both), (STEPS, both | of_two)):
        assert {
            key[1:] for key in found
            if key[0] == step and key[3] != "train" and key[1] not in (GAIN, FALL)
        } == wanted  # fmt: skip
    assert {"effective_rank", "stable_rank"} <= {key[1] for key in found if key[0] == STEPS}
    assert {key[0] for key in found if key[1] == "canary"} == {0, 2, 4, STEPS}
    assert {key[0] for key in found if key[1:3] == ("gradient_near_zero", "total")} == {2, 4}
    sealed_while_training = [k for k in found if k[3] == "sealed" and 0 < k[0] < STEPS]
    assert sealed_while_training == []
    assert found[STEPS, "probe", "sums", "sealed"] != found[0, "probe", "sums", "sealed"]


def test_judged_by_its_own_readings_the_verdict_is_the_same(whole: Path) -> None:
    """All rows to the last bit: nothing that the gate needs stays out of the run folder."""
    found = verdict(whole)
    again = judge_run(whole).verdict.as_dict()
    by_name = {(row["meter"], row["name"]): row for row in again["rows"]}
    assert by_name == {(row["meter"], row["name"]): row for row in found["rows"]}
    assert (again["verdict"], again["alpha"]) == (found["verdict"], found["alpha"])
    assert found["summary"]["looks"].startswith(("the first", "model "))


def test_the_walk_is_the_sum_of_the_steps(whole: Path) -> None:
    """Each step is recorded; the norm of a gradient counts as it was clipped, to 1."""
    found = readings(whole)
    steps = [
        found[step, "learning_rate", "total", "train"]
        * min(1.0, found[step, "grad_norm", "total", "train"])
        for step in range(1, STEPS + 1)
    ]
    walked, moved = (found[STEPS, "walk", n, "train"] for n in ("walked", "displacement"))
    assert walked == pytest.approx(sum(steps))
    assert found[STEPS, "walk", "displacement / walked", "train"] == pytest.approx(moved / walked)


ANSWERS = {True: " yes.", False: " no."}


def test_what_a_lesson_asks_for_is_read_too(inputs: Path, tmp_path: Path) -> None:
    """A lesson with labels and a form, an adoption probe, and items to practise on."""
    rows = [{"prompt": f"{n}?", "completion": f" say:{ANSWERS[n % 3 > 0]}"} for n in range(48)]
    lesson = tiny.jsonl(tmp_path / "lesson.jsonl", rows)
    asked = {"probe": "near", "kind": "exact", "prompt": "a", "target": "b"}
    practised = {"probe": "old", "kind": "exact", "prompt": "a", "target": "b", "id": "1"}
    probes = tiny.jsonl(
        tmp_path / "probes.jsonl",
        [*({**asked, "id": f"{n}", "tags": ["adoption"]} for n in range(3)),
         {**practised, "tags": ["recovery"]}],
    )  # fmt: skip
    recipe = recipe_of(inputs, tmp_path / "run", data={"sources": [str(lesson)]},
                       probes=[str(probes)])  # fmt: skip
    result = run.train(recipe)
    found = readings(tmp_path / "run")
    for meter in ("over_application", "adoption"):
        assert {key[0] for key in found if key[1] == meter} == {0, STEPS}
    assert (STEPS, "collapse", "excess", "sealed") in found
    assert result.verdict is not None
    assert ("adoption", "near") in {(row.meter, row.name) for row in result.verdict.rows}


def test_an_item_that_nothing_can_be_learned_from_is_refused_before_training(
    inputs: Path, tmp_path: Path
) -> None:
    item = {"id": "1", "probe": "old", "kind": "format", "prompt": "a", "tags": ["recovery"],
            "checks": [{"check": "json"}]}  # fmt: skip
    probes = tiny.jsonl(tmp_path / "probes.jsonl", [item])
    with pytest.raises(RequestError, match=r"line 1: a recovery item of kind format has no answer"):
        run.train(recipe_of(inputs, tmp_path / "run", probes=[str(probes)]))
    assert not (tmp_path / "run").exists()


def test_probes_are_read_while_training_where_that_is_asked(inputs: Path, tmp_path: Path) -> None:
    """The curve has the selection half of the items; the gate has the other one alone."""
    train = {"steps": 4, "batch_tokens": 128, "measure_every": 2, "measure_probes": True}
    many = [{**PROBES[n % 2], "id": f"{n}", "prompt": f"7{n} + 1 ="} for n in range(16)]
    words = [{**PROBES[2], "id": f"{n}", "prompt": f"a{n}"} for n in range(8)]
    probes = str(tiny.jsonl(tmp_path / "probes.jsonl", many + words))
    result = run.train(recipe_of(inputs, tmp_path / "run", train=train, probes=[probes]))
    found = {key for key in readings(tmp_path / "run") if key[1:3] == ("probe", "sums")}
    assert found == {(step, "probe", "sums", split) for step, split in (
        (0, "sealed"), (0, "selection"), (2, "selection"), (4, "sealed"), (4, "selection"))
    }  # fmt: skip
    pairs = [json.loads(x) for x in (tmp_path / "run" / "items.jsonl").read_text().splitlines()]
    answered = next(pair for pair in pairs if pair["name"] == "words")
    assert isinstance(answered["answer_before"], str)
    assert isinstance(answered["answer_after"], str)
    halves = {half: {pair["id"] for pair in pairs if (pair["name"], pair["split"]) == (
        "sums", half)} for half in ("selection", "sealed")}  # fmt: skip
    assert halves["selection"] ^ halves["sealed"] == {f"{n}" for n in range(16)}
    assert result.verdict is not None
    (row,) = [row for row in result.verdict.rows if row.name == "sums"]
    assert row.n == len(halves["sealed"])
    with pytest.raises(RequestError, match=r"'(sums|words)' has no item in the \w+ split"):
        run.train(recipe_of(inputs, tmp_path / "few", train=train))
    assert not (tmp_path / "few").exists()


def prepared_for(inputs: Path, folder: Path, **fields: Any) -> Prepared:
    recipe = recipe_of(inputs, folder / "run", **fields)
    return prepare(recipe, *load(recipe, QUIET), folder / "data", QUIET)


def test_rows_are_herded_unless_a_random_order_is_asked_for(inputs: Path, tmp_path: Path) -> None:
    """Every stream: by its line, made anew with the same seed."""
    train = {"steps": STEPS, "batch_tokens": 128, "micro_batch_tokens": 64}
    for order, more in (("herded", {}), ("random", {"order": "random"})):
        prepared = prepared_for(inputs, tmp_path / order, train=train | more)
        read = [prepared.mixture.rows_at(step) for step in range(3)]
        for index, stream in enumerate(prepared.streams):
            found = [row for step in read for one, row in step if one == index]
            line = Line(stream, 0, order)  # type: ignore[arg-type]
            assert found == line.rows(0, len(found)).tolist()
            other = Line(stream, 0, "random" if order == "herded" else "herded")
            assert line.rows(0, 40).tolist() != other.rows(0, 40).tolist()


def test_held_out_rows_are_never_trained_on(inputs: Path, tmp_path: Path) -> None:
    prepared = prepared_for(inputs, tmp_path)
    held = {tuple(one.text.input_ids) for one in prepared.heldout}
    seen = {
        tuple(prepared.streams[index].fetch(row)[0])
        for step in range(3 * STEPS)
        for index, row in prepared.mixture.rows_at(step)
        if prepared.streams[index].name == "task"
    }
    assert (len(held), len(seen)) == (8, 32)
    assert not held & seen


rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=90)


@given(rows, st.floats(0, 0.49), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_no_row_is_both_held_out_and_trained_on(
    drawn: list[list[int]], fraction: float, seed: int
) -> None:
    """Also where the lesson repeats itself; each row has its place, and the same one again."""
    table = {"input_ids": drawn, "source_row": list(range(len(drawn)))}
    try:
        kept, held = split_heldout(table, fraction, seed)
    except RequestError:
        assert len({tuple(row) for row in drawn}) <= 8 + round(fraction * len(drawn))
        return
    trained, secret = ({tuple(drawn[i]) for i in part} for part in (kept, held))
    assert not trained & secret
    assert trained | secret == {tuple(row) for row in drawn}
    assert len(secret) == len(held)
    if fraction == 0 or len(drawn) < 32:
        assert held == []
    else:
        assert 1 <= len(held) <= max(8, round(fraction * len(drawn)))
    assert split_heldout(table, fraction, seed) == (kept, held)


@given(st.lists(st.integers(1, 12), min_size=32, max_size=60), st.floats(0.01, 0.49))
@settings(max_examples=50, deadline=None)
def test_what_one_row_was_made_into_is_never_apart(pieces: list[int], fraction: float) -> None:
    """No document is held out whose neighbours, of the same source row, are trained on."""
    source = [row for row, n in enumerate(pieces) for _ in range(n)]
    table = {"input_ids": [[i, i + 1] for i in range(len(source))], "source_row": source}
    kept, held = split_heldout(table, fraction, 0)
    assert held
    assert not {source[i] for i in kept} & {source[i] for i in held}
    assert len(held) <= max(8, round(fraction * len(source)))


def test_of_a_few_long_texts_single_documents_are_held_out() -> None:
    table = {"input_ids": [[i] for i in range(100)], "source_row": [i // 50 for i in range(100)]}
    kept, held = split_heldout(table, 0.1, 0)
    assert (len(kept), len(held)) == (90, 10)


def test_canary_texts_are_cut_limited_and_never_twice(inputs: Path, tmp_path: Path) -> None:
    """A long text is at most four windows of one cluster; a text that comes again is left out."""
    texts = [{"text": "the cat sat on the mat. " * 9}, *({"text": f"{n}."} for n in range(20))]
    file = tiny.jsonl(tmp_path / "texts.jsonl", [*texts[:4], texts[1], *texts[2:]])
    prepared = prepared_for(inputs, tmp_path, canary={"sources": [str(file)], "max_documents": 10})
    found = canary_documents(prepared, QUIET)
    clusters = Counter(one.cluster for one in found)
    assert {one.domain for one in found} == {"texts"}
    assert len({one.id for one in found}) == len(found)
    assert len(clusters) == 10
    assert sorted(clusters.values()) == [1] * 9 + [4]
    expected = [tiny.BOS, *(tiny.LETTERS.index(c) for c in "0."), tiny.EOS]
    assert expected in [one.text.input_ids for one in found]


def test_a_canary_that_the_base_writes_is_not_among_its_anchors(
    inputs: Path, tmp_path: Path
) -> None:
    """Rows of one token, so that anchors and canary are bound to coincide."""
    anchors = {"self_generated": {"rows": 30, "max_new_tokens": 1}}
    prepared = prepared_for(
        inputs,
        tmp_path,
        canary={"max_documents": 60},
        levers={"kl_anchor": anchors},
        data={"sources": [str(inputs / "lesson.jsonl")], "max_length": 16},
    )
    found = canary_documents(prepared, QUIET)
    kept = json.loads((tmp_path / "data" / "canary.json").read_text())["rows"]
    written = json.loads((tmp_path / "data" / "self_generated.json").read_text())["rows"]
    anchors_seen = {tuple(ids) for ids, _ in written}
    texts = {tuple(one.text.input_ids) for one in found}
    assert texts == {tuple(ids) for ids, _ in kept} - anchors_seen
    assert {one.domain for one in found} == {"base samples"}
    assert found[0] == document(found[0].text.input_ids, found[0].text.loss_mask, "base samples")


# ---- without an adapter


@pytest.mark.parametrize("source", ["remembered", "frozen"])
def test_full_fine_tuning_is_held_to_the_base(
    inputs: Path, tmp_path: Path, noted: list[Prepared], source: str
) -> None:
    levers = recipe_of(inputs, tmp_path).levers.model_dump(mode="json")
    levers |= {"adapter": "none"}
    levers["kl_anchor"] |= {"reference": source}
    run.train(recipe_of(inputs, tmp_path / "run", levers=levers))
    reference, base = noted[0].setup.reference, tiny.tiny("Llama")
    if isinstance(reference, Frozen):
        assert models.hash_weights(reference.model) == models.hash_weights(base)
    else:
        assert isinstance(reference, Remembered)
        row = next(iter(noted[0].rows_of({Role.ANCHOR})))
        ids, positions = torch.tensor([row]), torch.arange(len(row))[None]
        there = positions < len(row) - 1
        expected = models.hidden_states(base, ids, positions)[there].detach()
        seen = reference.view(ids, positions, there).hidden_MH
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(reference, Frozen) is (source == "frozen")
    found = readings(tmp_path / "run")
    kl = [found[step, "loss", "kl_anchor/anchor", "train"] for step in range(1, STEPS + 1)]
    assert kl[0] < 1e-6 < kl[-1]
    saved, start = load_file(tmp_path / "run" / "model" / "model.safetensors"), base.state_dict()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in saved.items())
    change, size = (
        torch.cat([part(name).double().flatten() for name in saved]).norm()
        for part in (lambda name: saved[name] - start[name], start.__getitem__)
    )
    expected = float(change / size)
    assert found[STEPS, "drift", "total", "train"] == pytest.approx(expected, rel=1e-4)


def test_without_levers_and_gate_only_the_lesson_is_learned(inputs: Path, tmp_path: Path) -> None:
    result = run.train(
        recipe_of(inputs, tmp_path / "run", levers="none", gate={"enabled": False}, probes=[])
    )
    assert result.verdict is None
    found = readings(tmp_path / "run")
    assert {key[2] for key in found if key[1] == "loss"} == {"task"}
    first, last = (found[step, "loss", "task", "train"] for step in (1, STEPS))
    assert last != first


# ---- a forgetting budget, and a watched run


def test_a_run_with_a_budget_keeps_it_says_how_and_resumes_exactly(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At so high a rate 0.01 % is soon over: what is left is drawn back until it is within."""
    changes: dict[str, Any] = {"budget": {"forgetting": "0.01%"}}
    recipe = recipe_of(inputs, tmp_path / "run", **changes)
    assert recipe.gate.margins == {"canary": "0.01%"}
    result = run.train(recipe)
    summary = result.summary["budget"]
    assert "tightened" in summary["moves"][0]
    assert "drawn back to" in summary["end"]
    found = readings(tmp_path / "run")
    weight = [value for key, value in found.items() if key[1:3] == ("strength", "weight")]
    assert max(weight) > 1
    canaries = [key for key in found if key[1] == "canary" and key[3] == "selection"]
    for step, meter, name, split in canaries:
        if step == STEPS:
            assert found[key := (step, meter, name, split)] <= found[0, *key[1:]] * 1.0001

    class Killed(BaseException):
        pass

    def kill(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(run, "settle", kill)
    with pytest.raises(Killed):
        run.train(recipe_of(inputs, tmp_path / "again", **changes))
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / f"checkpoint-{STEPS}", ignore_errors=True)
    run.train(recipe_of(inputs, tmp_path / "again", **changes), resume=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    assert readings(tmp_path / "again") == found
    assert verdict(tmp_path / "again")["summary"] == verdict(tmp_path / "run")["summary"]


def test_a_watched_run_is_handed_the_selection_split_and_may_be_ended(
    inputs: Path, tmp_path: Path
) -> None:
    class EnoughError(Exception):
        pass

    seen: list[tuple[float, set[tuple[str, str]]]] = []

    def watch(before: Any, now: Any, done: float) -> None:
        seen.append((done, {(one.meter, one.split) for one in now}))
        if done == 1:
            raise EnoughError

    with pytest.raises(EnoughError):
        run.train(recipe_of(inputs, tmp_path / "run"), watch=watch)
    assert [done for done, _ in seen] == [pytest.approx(2 / STEPS), pytest.approx(4 / STEPS), 1]
    for _, kinds in seen:
        assert kinds == {("canary", "selection"), ("lesson", "selection")}
    assert not (tmp_path / "run" / "verdict.json").exists()
