"""Replay: exact shares of the tokens, domain by domain, and a loss that is the textbook's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from tiny_run import ALPHABET, LESSON, llama, tokenizer

import tiny
from holdfast.data.example import Role
from holdfast.data.mixer import freeze
from holdfast.data.mixture import Mixture
from holdfast.data.rows import Source
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.levers import Setup, StepState, TokenLosses
from holdfast.levers.replay import EARLIER, Replay
from holdfast.lineage import Stage
from holdfast.plan import settled
from holdfast.recipe import load_recipe

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


@pytest.mark.parametrize(
    ("settings", "role"),
    [
        ({}, Role.ANCHOR),
        ({"own_pretraining": True}, Role.REPLAY),
        ({"own_pretraining": True, "loss": "kl"}, Role.ANCHOR),
    ],
)
def test_its_own_pretraining_data_is_read_as_it_was(
    tmp_path: Path, setup: Setup, settings: dict[str, Any], role: Role
) -> None:
    replay = Replay(sources=[write(tmp_path / "a.jsonl", [9])], **settings)
    assert {stream.role for stream in replay.streams(setup)} == {role}
    assert replay.anchored == (role is Role.ANCHOR)


def test_skills_and_counterexamples_have_shares_of_their_own(tmp_path: Path, setup: Setup) -> None:
    """Counterexamples are given their answer whatever the loss on the rest."""
    asked = [{"prompt": "sum", "completion": "stays"}, {"prompt": "a", "completion": "b"}]
    rows = tmp_path / "leave.jsonl"
    rows.write_text("\n".join(map(json.dumps, asked)))
    corpus = [write(tmp_path / f"{name}.jsonl", [9, 9]) for name in ("code", "talk")]
    skills = [write(tmp_path / "sums.jsonl", [7])]
    replay = Replay(
        sources=corpus,
        own_pretraining=True,
        keep={"sources": skills, "fraction": 0.1},
        counterexamples={"sources": [str(rows)]},
    )
    streams = replay.streams(setup)
    assert {s.name: (round(s.share, 12), s.role) for s in streams} == {
        "replay/code": (0.1, Role.REPLAY),
        "replay/talk": (0.1, Role.REPLAY),
        "keep/sums": (0.1, Role.ANCHOR),
        "counterexamples/leave": (0.05, Role.REPLAY),
    }
    assert replay.share == pytest.approx(0.35)
    _, mask = streams[-1].fetch(0)
    assert list(mask) == [False] * 4 + [True] * 6, "BOS and the prompt are given; EOS is learned"
    # NLL rows are a quarter of the tokens: 0.2 of the corpus and 0.05 of counterexamples
    assert replay.terms(*losses(), {})["replay"].weight == pytest.approx(0.25 / 0.75)
    assert setup.notes["replay"].keys() == {*corpus, *skills, str(rows)}
    alone = Replay(counterexamples={"sources": [str(rows)]})
    assert (alone.off, alone.anchored, alone.share) == (False, False, 0.05)
    assert alone.terms(*losses(), {})["replay"].weight == pytest.approx(0.05 / 0.95)


def test_a_mixer_gives_the_shares_whatever_the_files_hold(tmp_path: Path, setup: Setup) -> None:
    sources = [
        Source(path=write(tmp_path / "code.jsonl", [20, 6, 11])),
        Source(path=write(tmp_path / "talk.jsonl", [5])),
    ]
    file = freeze(sources, None, {"code": 0.1}).write(tmp_path / "mixer.yaml")
    replay = Replay(mixer=str(file), fraction=0.5)
    assert shares(replay, setup) == pytest.approx({"replay/code": 0.05, "replay/talk": 0.45})
    assert [s.path for s in replay.sources_read()] == [s.path for s in sources]
    assert setup.notes["mixer"] == str(file)
    counted = freeze(sources, tiny.letters()).write(tmp_path / "counted.yaml")
    Replay(mixer=str(counted)).streams(setup)
    assert setup.notes["mixer"] == f"{counted}; its shares were counted with another tokenizer"
    before = replay.identity()
    file.write_text(file.read_text().replace("share: 0.9", "share: 0.90000001"))
    assert replay.identity() != before
    write(tmp_path / "talk.jsonl", [6])
    with pytest.raises(RequestError, match=r"mixer\.yaml: '.*talk\.jsonl' is not what was frozen"):
        replay.streams(setup)
    assert Replay(**Replay.OFF).sources_read() == []


def test_domains_that_a_mixer_was_edited_to_miss(tmp_path: Path, setup: Setup) -> None:
    file = freeze([Source(path=write(tmp_path / "code.jsonl", [9]))]).write(tmp_path / "m.yaml")
    file.write_text(file.read_text().replace("  code:\n", "  prose:\n"))
    with pytest.raises(RequestError, match="its domains and its rows differ in code, prose"):
        Replay(mixer=str(file)).streams(setup)


def test_a_mixer_takes_the_place_of_sources() -> None:
    with pytest.raises(ValidationError, match="sources and mixer are both given"):
        Replay(mixer="mixer.yaml", sources=["a.jsonl"])


def test_a_domain_of_the_canary_that_is_not_replayed_is_told() -> None:
    replay, stage = Replay(sources=["a.jsonl"]), Stage("no/where")
    streams = ["replay/code", "keep/sums"]
    assert replay.warnings(stage, ["code", "sums"], streams) == []
    (line,) = replay.warnings(stage, ["code", "latin", "greek"], streams)
    assert line.startswith("in the canary but not replayed: greek, latin; add rows")
    assert Replay().warnings(stage, ["latin"], []) == []


def a_run(folder: Path, lesson: str, *before: str) -> Stage:
    """A stage that learned these rows, after those before it."""
    recipe = {
        "data": {"sources": [Source(path=lesson).model_dump()]},
        "levers": {"replay": Replay(earlier={"sources": [*before]}).model_dump(mode="json")},
        "resolved": {},
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Stage(str(folder / "model"))


def test_what_earlier_stages_learned_is_held_without_being_asked_for(
    tmp_path: Path, setup: Setup
) -> None:
    first, second, now = (write(tmp_path / f"{n}.jsonl", [9]) for n in ("first", "second", "now"))
    stage = a_run(tmp_path / "two", second, first)
    assert [one["path"] for one in stage.taught()] == [second, first]
    replay = Replay().inherited(stage, [Source(path=now)], anchored=True)
    assert [source.path for source in replay.earlier.sources] == [second, first]
    streams = replay.streams(setup)
    assert {s.name: round(s.share, 12) for s in streams} == {
        "earlier/first": EARLIER / 2,
        "earlier/second": EARLIER / 2,
    }
    assert {s.role for s in streams} == {Role.ANCHOR}
    names = [s.name for s in streams]
    assert replay.warnings(stage, ["latin"], names) == []


def test_a_lesson_that_goes_on_is_not_held_back(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{name}.jsonl", [9]) for name in ("first", "second"))
    stage = a_run(tmp_path / "two", second, first)
    replay = Replay().inherited(stage, [Source(path=second)], anchored=True)
    assert [source.path for source in replay.earlier.sources] == [first]


@pytest.mark.parametrize(
    ("settings", "anchored"),
    [(Replay.OFF, True), ({"earlier": {"fraction": 0.0}}, True), ({}, False)],
)
def test_earlier_lessons_are_let_go_where_that_is_asked_for(
    tmp_path: Path, settings: dict[str, Any], anchored: bool
) -> None:
    stage = a_run(tmp_path / "one", write(tmp_path / "first.jsonl", [9]))
    replay = Replay(**settings)
    assert replay.inherited(stage, [], anchored=anchored) is replay
    own = Replay(earlier={"sources": ["mine.jsonl"]}).inherited(stage, [], anchored=True)
    assert [source.path for source in own.earlier.sources] == ["mine.jsonl"]


def test_a_lesson_whose_file_is_gone_is_told(tmp_path: Path) -> None:
    stage = a_run(tmp_path / "one", str(tmp_path / "gone.jsonl"))
    replay = Replay().inherited(stage, [], anchored=True)
    assert replay.off
    (line,) = replay.warnings(stage, [], [])
    assert line.startswith(f"the model was taught {tmp_path / 'gone.jsonl'}, which is not there")
    assert Replay(**Replay.OFF).warnings(stage, [], []) == []


def test_a_second_stage_says_what_it_holds(
    here: Path, quick: list[str], holdfast: Callable[..., Any], finished_run: Path
) -> None:
    (here / "next.jsonl").write_text((here / "lesson.jsonl").read_text())
    words = [f"model={finished_run}/model", "data=next.jsonl", *quick]
    if not (finished_run / "model").is_dir():
        words[0] = f"model={finished_run}"
    second = holdfast("train", *words, "out=two")
    assert second.code == 0, second.err
    assert "holding what was taught before:" in second.out
    recipe = yaml.safe_load((here / "two" / "recipe.yaml").read_text())
    taught = yaml.safe_load((finished_run / "recipe.yaml").read_text())["data"]["sources"]
    assert recipe["levers"]["replay"]["earlier"]["sources"] == taught
    again = holdfast("train", *words, "out=two", "--resume")
    assert again.code == 0, again.err
    refused = holdfast("validate", *words, "levers.kl_anchor.self_generated.fraction=0.95")
    assert refused.code == 2
    assert "came with lessons that it was taught, but" in refused.err


def test_what_comes_with_a_stage_leaves_automatic_what_is(here: Path, finished_run: Path) -> None:
    """A tiny model is trained whole, also where it was taught before."""
    (here / "next.jsonl").write_text((here / "lesson.jsonl").read_text())
    recipe = load_recipe(None, [], model=str(finished_run), data="next.jsonl")
    assert recipe.levers.replay.earlier.sources
    assert settled(recipe).levers.adapter.method == "none"


@pytest.mark.parametrize("kind", ["sources", "keep", "counterexamples", "mixer"])
def test_no_replayed_row_may_be_in_the_canary(
    here: Path, quick: list[str], holdfast: Callable[..., Any], kind: str
) -> None:
    """Whatever part of the lever reads it."""
    text = "the quick brown fox jumps over the lazy dog and then it sleeps for a long while"
    for name in ("old", "held"):
        rows = [json.dumps({"text": f"{name} one"}), json.dumps({"text": text})]
        (here / f"{name}.jsonl").write_text("\n".join(rows))
    given = {
        "sources": "levers.replay.sources=[old.jsonl]",
        "keep": "levers.replay.keep.sources=[old.jsonl]",
        "counterexamples": "levers.replay.counterexamples.sources=[old.jsonl]",
        "mixer": "levers.replay.mixer=mixer.yaml",
    }[kind]
    freeze([Source(path="old.jsonl")]).write(Path("mixer.yaml"))
    words = ["model=tiny", "data=lesson.jsonl", "canary.sources=[held.jsonl]", *quick]
    refused = holdfast("train", *words, "out=run", given)
    assert refused.code == 2
    assert "old.jsonl line 2: is also in held.jsonl line 2" in refused.err
    assert not (here / "run").exists()


@pytest.mark.parametrize("settings", [{}, {"sources": ["a.jsonl"], "fraction": 0.0}])
def test_off(setup: Setup, settings: dict[str, Any]) -> None:
    replay = Replay(**settings, loss="ntp")
    assert replay.off
    assert replay.streams(setup) == ()
    assert replay.terms(*losses(), {}) == {}
