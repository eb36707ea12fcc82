"""The command line's frozen surface, its exit codes, and what it must not import."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from holdfast.cli import app, main
from holdfast.cli.starter import starter
from holdfast.errors import HoldfastError
from holdfast.recipe import Recipe, load_recipe

Cli = Callable[..., Any]
"""The `holdfast` fixture: a command line's code, out and err."""

SURFACE = {
    "": ["--help", "--version"],
    "train": [
        "--data", "--dry-run", "--forget", "--help", "--json", "--model", "--out", "--resume",
        "settings",
    ],
    "sweep": [
        *("--forget", "--help", "--json", "--minutes", "--out", "--over", "--seed", "--storage"),
        *("--study", "--trials", "settings"),
    ],
    "init": ["--force", "--help", "path"],
    "validate": ["--help", "--json", "settings"],
    "check-data": ["--data", "--help", "--json", "--model", "--no-model", "settings"],
    "schema": ["--help"],
    "show-batch": ["--generate", "--help", "--json", "--step", "settings"],
    "demo": ["--help", "--out"],
    "theory": [
        "--dim", "--draws", "--fisher-noise", "--help", "--json", "--learnt", "--overlap", "--seed"
    ],
    "eval": [
        *("--canary", "--dtype", "--help", "--json", "--lesson", "--out", "--probes"),
        *("--run-generated-code", "--tokenizer", "model"),
    ],
    "compare": [
        *("--canary", "--dtype", "--fisher", "--help", "--json", "--lesson", "--out", "--probes"),
        *("--ranks", "--run-generated-code", "--seed", "--tokenizer", "base", "tuned"),
    ],
    "rewind": [
        *("--canary", "--dtype", "--help", "--json", "--margin", "--out", "--path", "--probes"),
        *("--rule", "--run-generated-code", "--seed", "--tokenizer", "base", "tuned"),
    ],
    "gate": [
        *("--canary", "--dtype", "--gate", "--help", "--json", "--junit", "--margin", "--markdown"),
        *("--out", "--probes", "--run-generated-code", "--seed", "--tokenizer", "base", "tuned"),
    ],
    "watch": ["--help", "--json", "--once", "folder"],
    "cache": ["--help"],
    "cache build": [
        *("--data", "--draws", "--help", "--json", "--mass", "--max-entries", "--model", "--on"),
        *("--out", "--shard", "--temperature", "settings"),
    ],
    "cache check": ["--help", "--json", "folder"],
    "cache merge": ["--help", "--json", "--out", "shards"],
    "lab": ["--help"],
    "mixer": ["--help"],
    "mixer freeze": ["--help", "--json", "--model", "--out", "--share", "sources"],
    "mixer show": ["--help", "--json", "file"],
    "probes": ["--help"],
    "probes check": ["--help", "--json", "--model", "files"],
    "probes import": [
        *("--chat", "--data", "--filter", "--help", "--json", "--max-new-tokens", "--n", "--out"),
        *("--probe", "--seed", "--shots", "--tag", "task"),
    ],
    "probes show": ["--help", "--json", "--n", "files"],
    "lab pretrain": ["--help", "--out", "--seed", "--steps"],
    "lab files": ["--counterexamples", "--help", "--json", "--lesson", "--seed", "folder"],
}  # fmt: skip
"""Every command with its options and arguments. A change here is a change for every user."""


def surface(command: Any, name: str = "") -> dict[str, list[str]]:
    """The commands below a command, and the options of each."""
    context = typer.Context(command)
    options = {o for p in command.get_params(context) for o in p.opts + p.secondary_opts}
    found = {name: sorted(options)}
    for inner, below in getattr(command, "commands", {}).items():
        found |= surface(below, f"{name} {inner}".strip())
    return found


def test_the_surface_is_frozen() -> None:
    assert surface(typer.main.get_command(app)) == SURFACE


@pytest.mark.parametrize("command", SURFACE)
def test_every_command_explains_itself(command: str, holdfast: Cli) -> None:
    result = holdfast(*command.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: holdfast {command}".strip())


def test_no_command_shows_help(holdfast: Cli) -> None:
    assert holdfast() == holdfast("--help")


def test_version(holdfast: Cli) -> None:
    assert re.fullmatch(r"holdfast \d+\.\d+\.\d+\n", holdfast("--version").out)


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("argv", "forbidden"),
    [
        (["--help"], ["torch", "transformers", "datasets", "pydantic", "yaml", "numpy"]),
        (["train", "--help"], ["torch", "transformers", "datasets", "yaml", "numpy"]),
        (["schema"], ["torch", "transformers", "datasets"]),
        (["init", "recipe.yaml"], ["torch", "transformers", "datasets"]),
        (["validate", "model=tiny", "data=lesson.jsonl"], ["torch", "transformers", "datasets"]),
        (["check-data", "--data", "lesson.jsonl"], ["torch", "transformers", "datasets"]),
    ],
    ids=lambda value: value[0],
)
def test_what_is_not_imported(argv: list[str], forbidden: list[str], here: Path) -> None:
    code = (
        "import sys; from holdfast.cli import main; code = main(sys.argv[1:]); "
        f"print([m for m in {forbidden} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = run_python(code, *argv)
    assert (done.returncode, done.stderr) == (0, "[]\n")


# ---- init


def test_the_starter_is_a_valid_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(starter())
    plain = load_recipe(words=["model=Qwen/Qwen3-0.6B", "data=lessons.jsonl"])
    assert load_recipe(tmp_path / "recipe.yaml") == plain


def test_the_starter_with_every_line_uncommented_means_the_same(tmp_path: Path) -> None:
    for name, text in [("before", starter()), ("after", re.sub(r"(?m)^# ", "", starter()))]:
        (tmp_path / name).write_text(text)
    assert (tmp_path / "before").stat().st_size > (tmp_path / "after").stat().st_size
    assert load_recipe(tmp_path / "before") == load_recipe(tmp_path / "after")


def test_the_starter_names_every_field() -> None:
    def keys(schema: Any) -> set[str]:
        inner = schema.values() if isinstance(schema, dict) else schema
        below = {key for part in inner if isinstance(part, dict | list) for key in keys(part)}
        return below | (set(schema.get("properties", ())) if isinstance(schema, dict) else set())

    in_lists = {"split", "domain", "proportion", "limit"}  # of a source, none by default
    assert keys(Recipe.model_json_schema()) - in_lists == set(
        re.findall(r"^(?:# )? *(\w+):(?: |$)", starter(), flags=re.MULTILINE)
    )


def test_init_writes_it_once(here: Path, holdfast: Cli) -> None:
    assert holdfast("init").code == 0
    assert (here / "recipe.yaml").read_text() == starter()
    (here / "recipe.yaml").write_text("mine")
    assert holdfast("init").code == 2
    assert (here / "recipe.yaml").read_text() == "mine"
    assert holdfast("init", "--force").code == 0
    assert (here / "recipe.yaml").read_text() == starter()


# ---- schema, validate


def test_schema(holdfast: Cli) -> None:
    assert json.loads(holdfast("schema").out) == Recipe.model_json_schema()


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": "a/b", "data": "lessons.jsonl"},
        {"model": "a/b", "data": ["a.jsonl", {"path": "b.jsonl"}], "probes": "p.jsonl"},
        {"model": {"path": "a/b"}, "data": "x", "levers": "none", "alarms": "off"},
        {
            "model": "a/b",
            "data": "x",
            "levers": {"kl_anchor": "off"},
            "budget": {"forgetting": "1%"},
        },
    ],
)
def test_the_schema_takes_what_a_recipe_may_say(recipe: dict[str, Any]) -> None:
    Recipe.model_validate(recipe)
    jsonschema.validate(recipe, Recipe.model_json_schema())


def test_a_file_that_may_not_be_used_is_one_line(
    here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    result = holdfast("validate", "model=tiny", "data=lesson.jsonl")
    assert result.code == 2
    assert result.err == "holdfast: 'lesson.jsonl': permission denied; mend that, or name another\n"


def test_the_home_of_nobody_is_one_line(here: Path, holdfast: Cli) -> None:
    result = holdfast("validate", "model=~no_such_user/base", "data=lesson.jsonl")
    assert result.code == 2
    assert result.err == (
        "holdfast: a path begins with ~ and a name that is no user here; give it in full\n"
    )


def test_a_home_is_a_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = Recipe.model_validate(
        {"model": "a/b", "data": "x", "out": "~/x", "probes": "~/p.jsonl"}
    )
    assert (found.out, found.probes) == ("/home/me/x", ["/home/me/p.jsonl"])


def test_validate_says_what_is_there(here: Path, holdfast: Cli) -> None:
    (here / "old.jsonl").write_text('{"text": "abc", "domain": "prose", "id": 7}\n')
    words = ["model=tiny", "data=lesson.jsonl", "levers.replay.sources=[old.jsonl]"]
    assert holdfast("validate", *words).out.splitlines() == [
        "data: lesson.jsonl: 40 rows of prompt_completion, 455 characters",
        "levers.replay: old.jsonl: 1 rows of text, 3 characters; domains: prose 1; "
        "keys not read: id",
        "all is well",
    ]
    found = json.loads(holdfast("validate", *words, "--json").out)
    assert found["ok"] is True
    assert [source["rows"]["rows"] for source in found["sources"]] == [40, 1]


def test_problems_as_json(here: Path, holdfast: Cli) -> None:
    result = holdfast("validate", "model=tiny", "data=gone.jsonl", "seed=-1", "--json")
    assert (result.code, result.err) == (2, "")
    (problem,) = json.loads(result.out)["error"]
    assert problem.startswith("seed: -1 is not allowed")


# ---- show-batch


def test_show_batch(here: Path, quick: list[str], holdfast: Cli) -> None:
    words = ["model=tiny", "data=lesson.jsonl", *quick]
    shown = json.loads(holdfast("show-batch", *words, "--json").out)
    assert shown["step"] == 0
    assert set(shown["tokens"]) == {"task", "self_generated"}
    for row in shown["rows"]:
        assert row["stream"] == "task", "what the base has not written is not shown"
        assert len(row["ids"]) == len(row["tokens"]) == len(row["roles"])
        assert re.fullmatch(r"<s>(\d+) \+ \1 = \d+</s>", row["text"])
        learned = "".join(
            t for t, r in zip(row["tokens"], row["roles"], strict=True) if r == "task"
        )
        assert re.fullmatch(r"Ġ\d+</s>", learned), "the response and its end are learned"
    assert "self_generated rows are not written yet" in holdfast("show-batch", *words).out


def test_show_batch_shows_the_rows_of_the_run(here: Path, quick: list[str], holdfast: Cli) -> None:
    words = ["show-batch", "model=tiny", "data=lesson.jsonl", *quick, "--step", "1", "--json"]
    sketched = json.loads(holdfast(*words).out)["rows"]
    generated = json.loads(holdfast(*words, "--generate").out)["rows"]
    assert [row for row in generated if row["stream"] == "task"] == sketched
    assert {row["stream"] for row in generated} == {"task", "self_generated"}
    assert (
        list(here.iterdir()) == [here / "tiny", here / "lesson.jsonl"]
        or len(list(here.iterdir())) == 2
    ), "nothing is written"


# ---- train


def test_a_dry_run_writes_nothing(here: Path, quick: list[str], holdfast: Cli) -> None:
    argv = ["train", "--model", "tiny", "--data", "lesson.jsonl", *quick, "--dry-run"]
    text = holdfast(*argv)
    assert text.code == 0
    assert "self_generated" in text.out
    shown = json.loads(holdfast(*argv, "--json").out)
    assert Recipe.model_validate(shown["recipe"]).train.steps == 2
    assert shown["plan"]["steps"] == 2
    assert sorted(path.name for path in here.iterdir()) == ["lesson.jsonl", "tiny"]


def test_a_run_from_start_to_verdict(here: Path, quick: list[str], holdfast: Cli) -> None:
    (here / "recipe.yaml").write_text("model: tiny\ndata: lesson.jsonl\nout: elsewhere\n")
    argv = ["train", "recipe.yaml", *quick, "--out", "run", "--json", "gate.enabled=true"]
    result = holdfast(*argv, "data.heldout=0.2")
    shown = json.loads(result.out)
    assert shown["folder"] == "run"
    assert shown["summary"]["steps"] == 2
    assert result.code == shown["verdict"]["exit_code"]
    assert not (here / "elsewhere").exists(), "--out wins over the recipe"


@pytest.mark.parametrize(("exit_code", "verdict"), [(0, "PASS"), (3, "FAIL"), (4, "INCONCLUSIVE")])
def test_the_exit_code_is_the_verdicts(
    exit_code: int, verdict: str, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.gate.verdict import GateResult, Verdict
    from holdfast.run import RunResult

    judged = GateResult(Verdict(verdict), f"{verdict}: as asked.", 0.05, ())
    outcome = RunResult(Path("run"), judged, 1.0, {})
    monkeypatch.setattr("holdfast.run.train", lambda *_args, **_named: outcome)
    result = holdfast("train", "--model", "tiny", "--data", "lesson.jsonl", "--out", "run")
    assert result.code == exit_code
    assert f"{verdict}: as asked." in result.out
    assert result.out.endswith("report: run/report.html\n")


def test_resume_needs_only_the_folder(finished_run: Path, holdfast: Cli) -> None:
    result = holdfast("train", "--resume", "--out", str(finished_run), "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["summary"]["steps"] == 2


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let training end in an error."""

    def train(*_args: Any, **_named: Any) -> None:
        raise error

    monkeypatch.setattr("holdfast.run.train", train)


TRAIN = ["train", "--model", "tiny", "--data", "lesson.jsonl", "--out", "a run"]


def test_a_failure_of_ours_is_one_line(
    here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, HoldfastError("step 7: it broke"))
    assert holdfast(*TRAIN) == (1, "", "holdfast: step 7: it broke\n")


def test_an_interrupted_run_says_how_to_go_on(
    here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    early = holdfast(*TRAIN)
    assert (early.code, early.err) == (
        130,
        "holdfast: interrupted; nothing was trained yet; start it again\n",
    )
    (here / "a run").mkdir()
    (here / "a run" / "recipe.yaml").write_text("model: tiny\ndata: lesson.jsonl\n")
    late = holdfast("train", "--resume", "--out", "a run")
    assert late.code == 130
    assert late.err.endswith("continue it with: holdfast train --resume --out 'a run'\n")


@pytest.mark.parametrize("where", ["accelerator", "machine", "python"])
def test_out_of_memory_names_what_to_lower(
    where: str, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    errors = {
        "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "machine": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        "python": MemoryError(),
    }
    failing(monkeypatch, errors[where])
    result = holdfast(*TRAIN)
    assert result.code == 1
    assert re.fullmatch("holdfast: out of memory; lower train.micro_batch_tokens.*\n", result.err)


def test_a_bug_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(TRAIN)


# ---- lab


def test_lab_files(here: Path, holdfast: Cli) -> None:
    result = holdfast("lab", "files", "lab", "--seed", "1", "--counterexamples", "5", "--json")
    paths = json.loads(result.out)
    assert set(paths) == {"lesson", "probes", "canary", "replay"}
    assert len(Path(paths["lesson"]).read_text().splitlines()) == 605


def test_lab_pretrain_hands_its_options_on(
    here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}
    monkeypatch.setattr(
        "holdfast.lab.pretrain.pretrain", lambda out, **options: called.update(out=out, **options)
    )
    assert holdfast("lab", "pretrain", "--out", "base", "--steps", "3", "--seed", "2").code == 0
    assert (called["out"], called["steps"], called["seed"]) == (Path("base"), 3, 2)


def test_demo_hands_its_folder_on(
    here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.demo.demo", lambda out, console: 4 * (out == Path("tour")))
    assert holdfast("demo", "--out", "tour").code == 4
