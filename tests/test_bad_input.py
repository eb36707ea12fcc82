"""Wrong requests: each ends in exit code 2 with one line a problem, and nothing is left behind.

A line must hold the given fragments: where the problem is, what stands there, how to mend it.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Line = tuple[str, ...]
"""Fragments of one line on stderr."""

TRAIN = "train --model tiny --data lesson.jsonl --out run"
RECIPE = "model: tiny\ndata: lesson.jsonl\nout: run\n"
GOOD_ROW = '{"prompt": "1 + 1 =", "completion": " 2"}\n'


@dataclass
class Wrong:
    """A wrong request, and what must be said about it."""

    argv: str
    lines: list[Line]
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)
    """Files to write before, by name; None deletes."""
    arrange: Callable[[Path, pytest.MonkeyPatch], Any] = lambda _here, _patch: None


def recipe(text: str, *lines: Line, words: str = "") -> Wrong:
    """A recipe with something wrong in it, beside model, lesson and out."""
    return Wrong(f"train recipe.yaml {words}", list(lines), {"recipe.yaml": RECIPE + text})


def words(argv: str, *lines: Line) -> Wrong:
    """Settings with something wrong in them."""
    return Wrong(f"{TRAIN} {argv}", list(lines))


def lesson(text: str | bytes, *lines: Line) -> Wrong:
    """A lesson with something wrong in it."""
    return Wrong(TRAIN, list(lines), {"lesson.jsonl": text})


def model(files: Mapping[str, str | bytes | None], *lines: Line) -> Wrong:
    """A model folder with something wrong in it."""
    return Wrong(TRAIN, list(lines), {f"tiny/{name}": text for name, text in files.items()})


def probes(text: str | bytes, *lines: Line) -> Wrong:
    """A probe file with something wrong in it."""
    return Wrong(f"{TRAIN} probes=probes.jsonl", list(lines), {"probes.jsonl": text})


def item(**fields: Any) -> str:
    """A line of a probe file."""
    sound = {"id": "1", "probe": "sums", "kind": "exact", "prompt": "1 + 1 =", "target": " 2"}
    return json.dumps({**sound, **fields}) + "\n"


def full_disk(_here: Path, patch: pytest.MonkeyPatch) -> None:
    """Every file that is written to the end finds the disk full."""

    def fsync(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def more_tokens(here: Path, _patch: pytest.MonkeyPatch) -> None:
    """A tokenizer in `grown/` that has more tokens than the model has rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(here / "tiny")
    tokenizer.add_tokens([f"<word {n}>" for n in range(50)])
    tokenizer.save_pretrained(here / "grown")


def other_tokens(here: Path, _patch: pytest.MonkeyPatch) -> None:
    """The model in `grown/`, with a token that the tokenizer of `tiny/` does not have."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(here / "tiny")
    tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(here / "grown")
    model = AutoModelForCausalLM.from_pretrained(here / "tiny")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(here / "grown")


MESSAGES = '{"messages": [{"role": "user", "content": "hi"}, {"role": "%s", "content": "yo"}]}\n'

WRONG = {
    # ---- the recipe
    "unknown key": recipe(
        "trian: {epochs: 1}", ("recipe.yaml: trian: unknown key", "did you mean 'train'?")
    ),
    "unknown key in a section": recipe(
        "train: {epoch: 1}", ("train.epoch: unknown key", "did you mean 'epochs'?")
    ),
    "unknown lever": recipe(
        "levers: {adaptor: {r: 2}}", ("levers.adaptor: unknown key", "did you mean 'adapter'?")
    ),
    "unknown key in a lever": recipe(
        "levers: {kl_anchor: {wieght: 2}}",
        ("levers.kl_anchor.wieght: unknown key", "did you mean 'weight'?"),
    ),
    "unknown key below a lever": recipe(
        "levers: {kl_anchor: {self_generated: {colour: red}}}",
        ("levers.kl_anchor.self_generated.colour: unknown key", "allowed: engine, "),
    ),
    "key of another section": recipe(
        "learning_rate: 1.0e-4", ("learning_rate", "did you mean 'levers.budget.learning_rate'?")
    ),
    "key that is no word": recipe("7: seven", ("7", "unknown key", "allowed: ")),
    "words for a number": recipe(
        "train: {steps: many}", ('train.steps: "many"', "valid integer", "leave it out")
    ),
    "fraction for an integer": recipe("seed: 1.5", ("seed: 1.5", "integer", "works: 0")),
    "list for a number": recipe("seed: [1, 2]", ("seed: [1, 2]", "integer", "works: 0")),
    "number for a section": recipe("train: 3", ("train: 3", "section", "epochs, steps")),
    "word for a list": recipe(
        "levers: {replay: {sources: old.jsonl}}",
        ('levers.replay.sources: "old.jsonl"', "valid list", "works: [old.jsonl]"),
    ),
    "nothing for a section": recipe("train:", ("train: null", "section", "leave it out")),
    "other choice": recipe(
        "levers: {budget: {schedule: cosin}}",
        ('levers.budget.schedule: "cosin"', "'cosine', 'linear'", "works: linear"),
    ),
    "no branch of a union": recipe(
        "levers: {budget: {learning_rate: fast}}",
        ('levers.budget.learning_rate: "fast"', "valid number", "or", "'auto'", "works: auto"),
    ),
    "zero epochs": recipe(
        "train: {epochs: 0}", ("train.epochs: 0", "greater than 0", "leave it out")
    ),
    "not a number": recipe("train: {epochs: .nan}", ("train.epochs: NaN", "leave it out")),
    "endless epochs": recipe("train: {epochs: .inf}", ("train.epochs: Infinity", "leave it out")),
    "fraction of one": recipe(
        "levers: {replay: {fraction: 1.0}}",
        ("levers.replay.fraction: 1.0", "less than 1", "works: 0.2"),
    ),
    "too much dropout": recipe(
        "levers: {adapter: {dropout: 1.5}}",
        ("levers.adapter.dropout: 1.5", "less than 1", "works: 0.0"),
    ),
    "margin without a unit": recipe(
        "gate: {margins: {sums: 2}}", ("gate.margins.sums: 2", "no unit", "2pt", "2%")
    ),
    "margin of the wrong sign": recipe(
        "gate: {margins: {sums: -2pt}}", ('gate.margins.sums: "-2pt"', "wrong sign", "write 2pt")
    ),
    "margin for nothing that is read": recipe(
        "gate: {margins: {canry: 2%}}", ("gate.margins: 'canry' names nothing", "mean 'canary'?")
    ),
    "margin of zero": recipe(
        "gate: {margins: {sums: 0pt}}", ('gate.margins.sums: "0pt"', "outside (0, 100]", "0.5pt")
    ),
    "several at once": recipe(
        "seed: -1\ntrain: {epochs: 0, epoch: 1}\ngate: {alpha: 0.7}",
        ("recipe.yaml: seed: -1",),
        ("recipe.yaml: train.epochs: 0",),
        ("recipe.yaml: train.epoch: unknown key",),
        ("recipe.yaml: gate.alpha: 0.7", "less than 0.5", "works: 0.05"),
    ),
    "key given twice": recipe(
        "seed: 1\nseed: 2", ("recipe.yaml", "line 5", "'seed' is given twice", "mend that line")
    ),
    "not YAML": recipe("train: {epochs: 1", ("recipe.yaml: not YAML", "line 4", "mend that line")),
    "a template, not YAML": recipe(
        "train: {{ train }}", ("recipe.yaml: not YAML", "line 4", "mend that line")
    ),
    "not a mapping": Wrong(
        "train recipe.yaml",
        [("recipe.yaml", "a recipe is a mapping", "such as 'model: PATH'")],
        {"recipe.yaml": "- model\n- data\n"},
    ),
    "empty recipe": Wrong(
        "train recipe.yaml",
        [("recipe.yaml: empty", "`holdfast init` writes")],
        {"recipe.yaml": "# nothing yet\n"},
    ),
    "recipe not UTF-8": Wrong(
        "train recipe.yaml",
        [("recipe.yaml: not UTF-8", "byte 10", "save the file as UTF-8")],
        {"recipe.yaml": b"model: caf\xe9\n"},
    ),
    "no such recipe": Wrong(
        "train recipy.yaml",
        [("recipe 'recipy.yaml' does not exist", "did you mean 'recipe.yaml'?")],
        {"recipe.yaml": RECIPE},
    ),
    "no recipe at all": Wrong(
        "train recipe.yaml", [("recipe 'recipe.yaml' does not exist", "`holdfast init` writes")]
    ),
    "neither model nor data": Wrong(
        "train",
        [("model: missing", "Qwen/Qwen3-0.6B"), ("data: missing", "lessons.jsonl")],
    ),
    "word without a value": words("epochs", ("'epochs'", "key=value", "train.epochs=2")),
    "word into a number": recipe(
        "train: 3",
        ("'train.epochs=1'", "train is 3, not a section", "leave it out"),
        ("recipe.yaml: train: 3", "section"),
        words="train.epochs=1",
    ),
    "unknown word": words("train.epoch=1", ("train.epoch: unknown key", "did you mean 'epochs'?")),
    "word that is not YAML": words(
        "'probes=[a'", ("'probes=[a'", "not YAML", "give a value such as 2, name or [a, b]")
    ),
    "kl replay without an anchor": words(
        "levers.kl_anchor=none levers.replay.sources=[lesson.jsonl]",
        ("levers.replay.loss: 'kl' needs levers.kl_anchor", "set levers.replay.loss: ntp"),
    ),
    "no room for the lesson": words(
        "levers.kl_anchor.self_generated.fraction=0.6 levers.replay.fraction=0.4 "
        "levers.replay.sources=[lesson.jsonl]",
        ("levers.replay.fraction + levers.kl_anchor", "1 leaves no token", "0.2 and 0.25"),
    ),
    "adapter_off without an adapter": words(
        "levers.adapter=none levers.kl_anchor.reference=adapter_off",
        ("levers.kl_anchor.reference: 'adapter_off' needs an adapter", "set it to frozen"),
    ),
    # ---- the reference
    "misspelt reference": words(
        "levers.kl_anchor.reference=frozn",
        ('levers.kl_anchor.reference: "frozn"', "did you mean 'frozen'?", "works: auto"),
    ),
    "no such stage": words(
        "levers.kl_anchor.reference=runs/gone/",
        ("levers.kl_anchor.reference: 'runs/gone/' does not exist", "give a folder"),
    ),
    "stage that is no model": Wrong(
        f"{TRAIN} levers.kl_anchor.reference=notes",
        [("levers.kl_anchor.reference: 'notes' has no config.json", "give a folder")],
        {"notes/notes.txt": "mine"},
    ),
    "stage with other tokens": Wrong(
        f"{TRAIN} levers.kl_anchor.reference=grown",
        [("levers.kl_anchor.reference: 'grown' has another vocabulary", "give a stage with")],
        arrange=other_tokens,
    ),
    "no such device": words(
        "levers.adapter=none levers.kl_anchor.reference_device=cuda:77",
        ("levers.kl_anchor.reference_device: 'cuda:77' is not a device", "give one of: cpu"),
    ),
    "reference_dtype without a copy": words(
        "levers.kl_anchor.reference=adapter_off levers.kl_anchor.reference_dtype=int8",
        ("levers.kl_anchor", "reference_dtype is for a second copy", "give reference: frozen"),
    ),
    "cache and another reference": words(
        "levers.kl_anchor.cache=stored levers.kl_anchor.reference=frozen",
        ("levers.kl_anchor", "cache is given but reference is 'frozen'", "give one of them"),
    ),
    "no cache named": words(
        "levers.kl_anchor.reference=cache",
        ("levers.kl_anchor", "reference 'cache' needs cache", "the folder that was built"),
    ),
    "no such cache": words(
        "levers.kl_anchor.cache=stored", ("cache 'stored'", "cache.json", "holdfast cache build")
    ),
    "temperature of zero": words(
        "levers.kl_anchor.divergence.temperature=0",
        ("levers.kl_anchor.divergence.temperature: 0", "greater than 0", "works: 1.0"),
    ),
    "weight on no lesson": words(
        "levers.kl_anchor.task_weight=2",
        ("levers.kl_anchor", "task_weight is for on: both", "give weight"),
    ),
    # ---- the lesson
    "empty lesson": lesson("", ("lesson.jsonl: has no rows", 'such as {"prompt"')),
    "malformed row": lesson(
        GOOD_ROW + '{"prompt": "a", "completion"\n' + GOOD_ROW,
        ("lesson.jsonl line 2", "is not JSON", "each line must be one object"),
    ),
    "row that is a list": lesson(
        GOOD_ROW + "[1, 2]\n", ("lesson.jsonl line 2", "is a list ([1, 2])", "must be one object")
    ),
    "row without a response": lesson(
        '{"prompt": "1 + 1 ="}\n', ("line 1", "'completion' is missing", 'add "completion"')
    ),
    "empty response": lesson(
        GOOD_ROW + '{"prompt": "a", "completion": ""}\n',
        ("line 2", "'completion' is empty", "write the response or delete the row"),
    ),
    "only a question": lesson(
        MESSAGES % "user", ("line 1", "'messages' has no assistant turn", "add one")
    ),
    "unknown role": lesson(
        MESSAGES % "asistant",
        ("line 1", "messages[1].role", '"asistant"', "did you mean 'assistant'?"),
        ("line 1", "no assistant turn"),
    ),
    "mixed formats": lesson(
        GOOD_ROW + '{"text": "words"}\n',
        ("lesson.jsonl: mixes formats", "line 1", "line 2", "keep one format"),
    ),
    "other names": lesson(
        '{"instruction": "a", "output": "b"}\n',
        ("line 1", "rename 'instruction' to 'prompt', 'output' to 'completion'"),
    ),
    "number for text": lesson(
        '{"prompt": "1 + 1 =", "completion": 2}\n',
        ("line 1", "'completion' is a number (2)", "must be a string"),
    ),
    "lesson not UTF-8": lesson(
        GOOD_ROW.encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n',
        ("lesson.jsonl line 2", "not UTF-8", "save the file as UTF-8"),
    ),
    "no such lesson": Wrong(
        "train --model tiny --data lessen.jsonl --out run",
        [("lessen.jsonl: no such file", "did you mean 'lesson.jsonl'?")],
    ),
    "lesson that is a pickle": Wrong(
        "train --model tiny --data lesson.pkl --out run",
        [("lesson.pkl", "never read", "save the rows as .jsonl")],
        {"lesson.pkl": b"\x80\x04."},
    ),
    "every source and probe at once": Wrong(
        "train --model tinny --data lessen.jsonl --out run levers.replay.sources=[old.jsonl] "
        "canary.sources=[canary.jsonl] probes=[probes.jsonl]",
        [
            ("model.path: 'tinny'", "did you mean 'tiny'?"),
            ("lessen.jsonl: no such file", "did you mean"),
            ("old.jsonl line 1", "has no messages"),
            ("canary.jsonl: has no rows",),
            ("probes.jsonl line 1", "not JSON"),
        ],
        {"old.jsonl": '{"body": "a"}\n', "canary.jsonl": "", "probes.jsonl": "{\n"},
    ),
    # ---- the model
    "no such model": Wrong(
        "train --model ./tinny --data lesson.jsonl --out run",
        [("model.path: './tinny' does not exist", "did you mean 'tiny'?")],
    ),
    "not a model folder": model(
        {"config.json": None}, ("model.path: 'tiny' has no config.json", "save_pretrained")
    ),
    "model that is a file": Wrong(
        "train --model lesson.jsonl --data lesson.jsonl --out run",
        [("model.path: 'lesson.jsonl' is a file", "give the folder")],
    ),
    "adapter for a model": model(
        {"config.json": None, "adapter_config.json": "{}"},
        ("model.path: 'tiny' has no adapter_model.safetensors", "give a folder"),
    ),
    "adapter that names no base": model(
        {"config.json": None, "adapter_config.json": "{}", "adapter_model.safetensors": b""},
        ("model.path: 'tiny' is an adapter that names no base", "set base_model_name_or_path"),
    ),
    "adapter that is a pickle": model(
        {"config.json": None, "adapter_config.json": "{}", "adapter_model.bin": b"\x80\x02."},
        ("adapter_model.bin' is a pickle and is never loaded", "safe_serialization=True"),
    ),
    "run that has not ended": Wrong(
        "train --model one --data lesson.jsonl --out run",
        [("model.path: 'one' is a run that has not ended", "holdfast train --resume --out one")],
        {"one/recipe.yaml": "model: {path: tiny}\nresolved: {steps: 2}\n"},
    ),
    "config not JSON": model({"config.json": "{"}, ("config.json: not JSON", "save_pretrained")),
    "config not an object": model({"config.json": "5"}, ("config.json", "save_pretrained")),
    "no model_type": model(
        {"config.json": "{}"}, ("config.json", "field model_type is missing", "llama")
    ),
    "unknown model_type": model(
        {"config.json": '{"model_type": "llamma"}'},
        ("model.path: 'tiny' cannot be loaded", "llamma", "; "),
    ),
    "pickled weights": model(
        {"model.safetensors": None, "pytorch_model.bin": b"\x80\x02."},
        ("pytorch_model.bin' is a pickle and is never loaded", "safe_serialization=True"),
    ),
    "no weights": model(
        {"model.safetensors": None}, ("model.path: 'tiny' has no *.safetensors", "give a folder")
    ),
    "torn weights": model(
        {"model.safetensors": b"\x10\x00"}, ("model.path: 'tiny' cannot be loaded", "; ")
    ),
    "no tokenizer": model(
        {"tokenizer.json": None, "tokenizer_config.json": None},
        ("model.path: 'tiny' has no tokenizer", "set model.tokenizer"),
    ),
    "more tokens than the embedding": Wrong(
        f"{TRAIN} model.tokenizer=grown",
        [("tokenizer 'grown' has 323 tokens", "embedding has 273 rows", "give the tokenizer")],
        arrange=more_tokens,
    ),
    "no such tokenizer": words(
        "model.tokenizer=./gone", ("model.tokenizer", "'./gone'", "does not exist", "give")
    ),
    "no such template": words(
        "model.chat_template=gone.jinja",
        ("model.chat_template: 'gone.jinja'", "neither a file nor a Jinja", "give"),
    ),
    "template that fails": Wrong(
        f'{TRAIN} "model.chat_template=\'{{{{ raise_exception(\\"no\\") }}}}\'"',
        [("lesson.jsonl line 1", "chat template", "refuses this conversation (no)", "give")],
    ),
    "template that is not Jinja": Wrong(
        f"{TRAIN} \"model.chat_template='{{% for %}}'\"",
        [("lesson.jsonl line 1", "chat template", "Expected an expression", "; ")],
    ),
    "messages without a template": lesson(
        MESSAGES % "assistant", ("lesson.jsonl line 1", "has no chat template", "choose a model")
    ),
    "rows longer than the context": words(
        "data.max_length=4096",
        ("data.max_length: 4096", "model's context of 128", "a value that works: 128"),
    ),
    # ---- the adapter
    "unknown peft method": words(
        "levers.adapter.method=lorra",
        ("levers.adapter.method: 'lorra' is not a peft method", "did you mean 'lora'?"),
    ),
    "unknown field of the adapter": words(
        "levers.adapter.config.use_rslorra=true",
        ("levers.adapter.config.use_rslorra: not a field of LoraConfig", "'use_rslora'?"),
    ),
    "target that matches nothing": words(
        "levers.adapter.target=[upp_proj]",
        ("levers.adapter", "upp_proj", "check the target modules"),
    ),
    # ---- the run folder
    "run folder in use": Wrong(
        TRAIN, [("out: 'run' is not empty", "another folder")], {"run/notes.txt": "mine"}
    ),
    "run folder of another run": Wrong(
        TRAIN,
        [("out: 'run' is not empty", "--resume to continue it", "another folder")],
        {"run/recipe.yaml": "seed: 1"},
    ),
    "run folder that is a file": Wrong(
        TRAIN, [("out: 'run' is a file", "give a folder")], {"run": "mine"}
    ),
    "run folder below a file": Wrong(
        "train --model tiny --data lesson.jsonl --out lesson.jsonl/run",
        [("out: 'lesson.jsonl/run'", "'lesson.jsonl' is a file", "give")],
    ),
    "resume of no run": Wrong(
        "train --resume --out notes",
        [("'notes' is not a run folder", "--out when the run was started")],
        {"notes/notes.txt": "mine"},
    ),
    "resume with other settings": Wrong(
        "train --resume --out run train.steps=9",
        [("--resume: train.steps was 2", "is 9 now", "restore what it was", "another --out")],
    ),
    "resume with another lesson": Wrong(
        "train --resume --out run data=other.jsonl",
        [
            ("--resume: data.sources was", "restore what it was", "another --out"),
            ("--resume: data_fingerprint was", "restore what it was", "another --out"),
        ],
        {"other.jsonl": GOOD_ROW * 40},
    ),
    "full disk": Wrong(
        TRAIN, [("the disk is full", "run", "free some space", "another disk")], arrange=full_disk
    ),
    "full disk for a starter": Wrong(
        "init starter.yaml", [("the disk is full", "'starter.yaml'", "free")], arrange=full_disk
    ),
    # ---- the probes
    "no such probes": words(
        "probes=prose.jsonl", ("probes: 'prose.jsonl' does not exist", "give a JSONL file")
    ),
    "probes not JSON": probes(item() + "{]\n", ("probes.jsonl line 2", "not JSON", "; ")),
    "probe id twice": probes(
        item() + item(), ("probes.jsonl line 2", "id '1'", "line 1", "ids are unique", "; ")
    ),
    "unknown kind": probes(item(kind="exakt"), ("line 1: kind", '"exakt"', "'exact'", "; ")),
    "unknown key of a probe": probes(
        item(promt="a"), ("line 1: promt: unknown key", "did you mean 'prompt'?")
    ),
    "answer out of range": probes(
        item(kind="choice", choices=["a", "b"], answer=2),
        ("probes.jsonl line 1: answer: 2 is not an index into 2 choices", "0 names the first"),
    ),
    "probe without a target": probes(item(target=" "), ("line 1: target", "needs one", "such as")),
    "empty probes": probes("\n", ("probes", "no items in probes.jsonl", "; ")),
    "probes not UTF-8": probes(b"\xff\n", ("probes.jsonl line 1", "not UTF-8", "; ")),
    # ---- the command line
    "unknown command": Wrong("trian", [("no such command 'trian'", "did you mean 'train'?")]),
    "unknown option": Wrong("train --modle tiny", [("--modle", "--model", "train --help")]),
    "option without a value": Wrong(
        "train --model", [("--model", "requires an argument", "see `holdfast")]
    ),
    "option of a wrong type": Wrong(
        "show-batch recipe.yaml --step one", [("--step", "integer", "show-batch --help")]
    ),
    "group without a command": Wrong("lab", [("missing command", "lab --help")]),
    "step beyond the run": Wrong(
        "show-batch model=tiny data=lesson.jsonl train.steps=2 --step 2",
        [("--step: 2 is beyond the run's 2 steps", "give 0 to 1")],
    ),
    "starter over a file": Wrong(
        "init lesson.jsonl", [("'lesson.jsonl' exists already", "--force")]
    ),
    "starter in no folder": Wrong("init gone/recipe.yaml", [("'gone' does not exist", "make it")]),
    "too many counterexamples": Wrong(
        "lab files out --counterexamples 100000000",
        [("--counterexamples: 100000000 are asked for", "give fewer")],
    ),
    "lesson that the lab has not": Wrong(
        "lab files out --lesson verb", [("--lesson: 'verb' is none", "'verbs'")]
    ),
    "counterexamples to facts": Wrong(
        "lab files out --lesson facts --counterexamples 3",
        [("--counterexamples: only the lesson 'verbs'", "leave it out")],
    ),
    "base over a base": Wrong("lab pretrain --out tiny", [("'tiny' exists already", "give")]),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request(
    name: str,
    here: Path,
    holdfast: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    wrong = WRONG[name]
    if "resume with" in name:
        shutil.copytree(request.getfixturevalue("finished_run"), here / "run")
    for file, text in wrong.files.items():
        path = here / file
        path.parent.mkdir(exist_ok=True)
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text.encode() if isinstance(text, str) else text)
    wrong.arrange(here, monkeypatch)
    before = contents(here)

    result = holdfast(*shlex.split(wrong.argv))

    lines = result.err.splitlines()
    assert (result.code, result.out) == (2, ""), result.err
    assert len(lines) == len(wrong.lines), result.err
    for line, fragments in zip(lines, wrong.lines, strict=True):
        assert line.startswith("holdfast: ")
        assert [fragment for fragment in fragments if fragment not in line] == [], line
    assert contents(here) == before, "something was left behind"
