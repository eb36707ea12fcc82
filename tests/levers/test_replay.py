"""Replay: exact shares of the tokens, domain by domain, and a loss that is the textbook's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ALPHABET, LESSON, llama, tokenizer

from holdfast.data.example import Role
from holdfast.data.mixture import Mixture
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.levers import Setup, StepState, TokenLosses
from holdfast.levers.replay import Replay

NO_KL = torch.empty(0)


def write(file: Path, lengths: list[int], **more: str) -> str:
    """Text rows of these many letters; BOS or EOS come on top."""
    rows = [json.dumps({"text": (ALPHABET * 2)[i : i + n], **more}) for i, n in enumerate(lengths)]
    file.write_text("\n".join(rows))
    return str(file)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(llama(), tokenizer(), tmp_path / "data", seed=0, max_length=24)


def shares(replay: Replay, setup: Setup) -> dict[str, float]:
    return {stream.name: stream.share for stream in replay.streams(setup)}


def test_every_domain_gets_its_exact_share_of_the_tokens(tmp_path: Path, setup: Setup) -> None:
    sources = [
        {"path": write(tmp_path / "code.jsonl", [20, 6, 11]), "proportion": 3},
        {"path": write(tmp_path / "talk.jsonl", [5, 17]), "domain": "spanish", "proportion": 1},
    ]
    replay = Replay(sources=sources, fraction=0.2)
    assert shares(replay, setup) == pytest.approx({"replay/code": 0.15, "replay/spanish": 0.05})
    task = Stream.of("task", Role.TASK, 0.8, LESSON)
    settings = {"batch_tokens": 100, "seed": 0, "steps": 300, "micro_batches": 1, "width": 24}
    mixture = Mixture([task, *replay.streams(setup)], **settings, pad_token_id=63)
    served: Counter[str] = Counter()
    for step in range(300):
        for index, row in mixture.rows_at(step):
            stream = mixture.streams[index]
            served[stream.name] += len(stream.fetch(row)[0])
    for name, share in {"task": 0.8, "replay/code": 0.15, "replay/spanish": 0.05}.items():
        assert abs(served[name] - share * 100 * 300) < 24, name


def test_without_proportions_a_corpus_is_replayed_as_it_is_mixed(
    tmp_path: Path, setup: Setup
) -> None:
    sources = [
        write(tmp_path / "a.jsonl", [9, 9], domain="code"),
        write(tmp_path / "b.jsonl", [9]),
        write(tmp_path / "c.jsonl", [9], domain="code"),
    ]
    # three rows of one length are code, one is of its file's own name
    expected = {"replay/code": 0.3, "replay/b": 0.1}
    assert shares(Replay(sources=sources, fraction=0.4), setup) == pytest.approx(expected)


def test_proportions_are_for_all_sources_or_none(tmp_path: Path, setup: Setup) -> None:
    sources = [
        {"path": write(tmp_path / "a.jsonl", [9]), "proportion": 1},
        write(tmp_path / "b.jsonl", [9]),
    ]
    with pytest.raises(RequestError, match=r"b\.jsonl' has no proportion but another source has"):
        Replay(sources=sources).streams(setup)


@pytest.mark.parametrize(("loss", "role"), [("kl", Role.ANCHOR), ("ntp", Role.REPLAY)])
def test_its_rows_are_anchors_or_lessons(
    tmp_path: Path, setup: Setup, loss: Any, role: Role
) -> None:
    replay = Replay(sources=[write(tmp_path / "a.jsonl", [9])], loss=loss)
    assert {stream.role for stream in replay.streams(setup)} == {role}
    assert bool(replay.terms(*losses(), {})) == (loss == "ntp")


def losses(task: int = 80, replay: int = 20) -> tuple[TokenLosses, StepState]:
    """A step of so many tokens, each with a loss of its own."""
    nll = torch.from_numpy(np.random.default_rng(0).uniform(0, 5, task + replay))
    roles = torch.tensor([Role.TASK] * task + [Role.REPLAY] * replay)
    totals = dict.fromkeys(Role, 0) | {Role.TASK: task, Role.REPLAY: replay}
    return TokenLosses(nll, roles, NO_KL, NO_KL), StepState(0, totals, 1)


def test_by_default_the_loss_is_that_of_one_mixed_batch() -> None:
    """(1 - r) L_lesson + r L_replay is the mean over all tokens; ours is that over 1 - r."""
    out, state = losses(task=80, replay=20)
    term = Replay(sources=["a.jsonl"], fraction=0.2, loss="ntp").terms(out, state, {})["replay"]
    lesson = out.nll[:80].mean()
    whole = lesson + term.weight * term.sum / term.count
    assert float(whole) == pytest.approx(float(out.nll.mean()) / (1 - 0.2))


def test_a_weight_of_ones_own() -> None:
    out, state = losses()
    replay = Replay(sources=["a.jsonl"], loss="ntp", weight=0.7)
    term = replay.terms(out, state, {})["replay"]
    assert (term.weight, term.count) == (0.7, 20)
    assert float(term.sum) == pytest.approx(float(out.nll[80:].sum()))
    assert replay.terms(*losses(replay=0), {}) == {}


@pytest.mark.parametrize("settings", [{}, {"sources": ["a.jsonl"], "fraction": 0.0}])
def test_off(setup: Setup, settings: dict[str, Any]) -> None:
    replay = Replay(**settings, loss="ntp")
    assert replay.off
    assert replay.streams(setup) == ()
    assert replay.terms(*losses(), {}) == {}
