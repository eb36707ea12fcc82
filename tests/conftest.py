"""What many tests need: a tiny random model with its tokenizer, a tiny lesson, the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("untimed", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _results_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stored probe results are the session's, never the user's."""
    os.environ["HOLDFAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


QUICK = [
    "train.steps=2",
    "train.batch_tokens=128",
    "train.micro_batch_tokens=128",
    "data.heldout=0",
    "levers.adapter.method=lora",
    "levers.kl_anchor.self_generated={rows: 4, max_new_tokens: 8}",
    "canary.max_documents=8",
    "gate.enabled=false",
]


class Outcome(NamedTuple):
    """What one command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers, 300 tokens, 32 hidden units."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from holdfast.lab.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat", "1 + 1 = 2"], vocabulary=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny_model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty sums as prompt + completion."""
    file = tmp_path_factory.mktemp("tiny_lesson") / "lesson.jsonl"
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def here(
    tiny_model: Path, tiny_lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working folder, and the current one, that holds `tiny/` and `lesson.jsonl`."""
    shutil.copytree(tiny_model, tmp_path / "tiny")
    shutil.copy(tiny_lesson, tmp_path / "lesson.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Settings under which a run takes seconds."""
    return list(QUICK)


@pytest.fixture
def holdfast(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, called in this process."""
    from holdfast.cli import main

    def call(*argv: str) -> Outcome:
        capfd.readouterr()
        code = main(argv)
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def finished_run(
    tiny_model: Path, tiny_lesson: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of two steps, made with the tiny model and lesson."""
    from holdfast.cli import main

    out = tmp_path_factory.mktemp("finished_run") / "run"
    given = ["--model", str(tiny_model), "--data", str(tiny_lesson), "--out", str(out)]
    assert main(["train", *given, *QUICK]) == 0
    return out
