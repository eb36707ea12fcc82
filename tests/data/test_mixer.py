"""The mixer file: counted once, known by content, and carried from stage to stage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from holdfast.data.mixer import FILE, Mixer, freeze, mixer_of, read_mixer
from holdfast.data.rows import Source
from holdfast.errors import RequestError
from holdfast.lineage import Stage

TOKENIZER = tiny.letters()
MARKS = 2
"""BOS and EOS of each row; a letter is a token."""


def source(folder: Path, name: str, rows: list[int], **fields: Any) -> Source:
    texts = [{"text": "a" * n} for n in rows]
    return Source(path=str(tiny.jsonl(folder / f"{name}.jsonl", texts)), **fields)


@pytest.fixture
def mixed(tmp_path: Path) -> list[Source]:
    """30 tokens of code in two rows, 10 of prose, and 20 that a row itself calls code."""
    own = tiny.jsonl(tmp_path / "own.jsonl", [{"text": "a" * 18, "domain": "code"}])
    return [
        source(tmp_path, "a", [18, 8], domain="code"),
        source(tmp_path, "prose", [8]),
        Source(path=str(own)),
    ]


def test_it_counts_the_tokens_of_every_domain(mixed: list[Source]) -> None:
    found = freeze(mixed, TOKENIZER)
    assert found.shares == pytest.approx({"code": 50 / 60, "prose": 10 / 60})
    assert {name: domain.tokens for name, domain in found.domains.items()} == {
        "code": 50,
        "prose": 10,
    }
    assert [s.domain for s in found.sources] == ["code", "prose", "own"]


def test_rows_are_counted_before_they_are_cut(tmp_path: Path) -> None:
    long = source(tmp_path, "long", [5000])
    assert freeze([long], TOKENIZER).domains["long"].tokens == 5000 + MARKS


@given(st.floats(0.01, 0.99), st.lists(st.integers(1, 30), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_what_is_not_given_is_shared_by_tokens(
    tmp_path_factory: pytest.TempPathFactory, share: float, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("rest")
    sources = [source(folder, f"d{i}", [n]) for i, n in enumerate(sizes)]
    found = freeze(sources, TOKENIZER, {"d0": share}).shares
    tokens = [n + MARKS for n in sizes]
    expected = {f"d{i}": (1 - share) * n / sum(tokens[1:]) for i, n in enumerate(tokens)}
    assert found == pytest.approx(expected | {"d0": share})
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)


def test_with_all_shares_given_nothing_is_counted(mixed: list[Source]) -> None:
    found = freeze(mixed, None, {"code": 0.3, "prose": 0.7})
    assert found.shares == pytest.approx({"code": 0.3, "prose": 0.7})
    assert found.tokenizer is None
    assert {domain.tokens for domain in found.domains.values()} == {None}
    assert freeze(mixed, None, {"code": 0.3}).shares == pytest.approx({"code": 0.3, "prose": 0.7})


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({}, "--model: missing, to count the tokens of code, prose"),
        ({"cod": 0.3}, "no row is of domain 'cod'; did you mean 'code'"),
        ({"code": 1.5}, "code=1.5 is not above 0 and at most 1"),
        ({"code": 1.0}, "leaves nothing for prose"),
        ({"code": 0.3, "prose": 0.3}, "sum to 0.6; make them sum to 1, such as code=0.5"),
    ],
)
def test_shares_that_cannot_be(mixed: list[Source], shares: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        freeze(mixed, None, shares)
    assert said in str(refused.value)


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    empty = Source(path=str(tiny.jsonl(tmp_path / "empty.jsonl", [{"text": " "}])))
    with pytest.raises(RequestError, match="no rows to replay"):
        freeze([empty], TOKENIZER)


def test_it_is_written_once_and_read_back(tmp_path: Path, mixed: list[Source]) -> None:
    frozen, file = freeze(mixed, TOKENIZER), tmp_path / FILE
    frozen.write(file)
    assert read_mixer(file) == frozen
    plain = yaml.safe_load(file.read_text())
    assert plain["format"] == 1
    assert plain["sources"][0].keys() == {"path", "domain", "sha256"}
    with pytest.raises(RequestError, match="kept for life"):
        frozen.write(file)
    with pytest.raises(RequestError, match="does not exist; make it first"):
        frozen.write(tmp_path / "no" / FILE)


def test_the_tokenizer_is_known_by_its_vocabulary(mixed: list[Source]) -> None:
    other = tiny.letters()
    assert freeze(mixed, TOKENIZER).tokenizer == freeze(mixed, other).tokenizer
    other.add_tokens(["aa"])
    assert freeze(mixed, TOKENIZER).tokenizer != freeze(mixed, other).tokenizer


def test_a_source_is_known_by_its_content(tmp_path: Path, mixed: list[Source]) -> None:
    """Moved it is the same; with one letter changed it is refused by name."""
    frozen = freeze(mixed, TOKENIZER)
    frozen.check("mixer.yaml")
    moved = tmp_path / "moved.jsonl"
    shutil.move(mixed[1].path, moved)
    (missing,) = frozen.changed()
    assert missing.startswith(f"{mixed[1].path}: no such file or folder")
    plain = frozen.model_dump()
    plain["sources"][1]["path"] = str(moved)
    Mixer.model_validate(plain).check("mixer.yaml")
    file = Path(mixed[0].path)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text().replace("a", "b", 1))
    assert hashlib.sha256(file.read_bytes()).hexdigest() != before
    with pytest.raises(RequestError) as refused:
        Mixer.model_validate(plain).check("mixer.yaml")
    (line,) = refused.value.problems
    assert line.startswith(f"mixer.yaml: '{file}' is not what was frozen")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML text"),
        ("[1]", "is not a mixer file"),
        ("model: x", "is not a mixer file"),
        ("format: 2", "format 2 is not known; this version reads format 1"),
        ("format: 1", "domains: missing"),
        (
            "{format: 1, domains: {a: {share: 0.5}}, sources: [{path: a, sha256: b}]}",
            "shares sum to 0.5; make them sum to 1",
        ),
        (
            "{format: 1, domains: {a: {share: 1}}, sources: [{path: a}]}",
            "sources[0].sha256: missing",
        ),
    ],
)
def test_files_that_are_no_mixer(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RequestError) as refused:
        read_mixer(tmp_path / FILE)
    assert said in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"levers\.replay\.mixer: .* cannot be read"):
        read_mixer(tmp_path / FILE)


def test_a_stage_has_the_mixer_of_its_run_before_that_beside_its_weights(tmp_path: Path) -> None:
    model, adapter, run = (tmp_path / name for name in ("model", "adapter", "run"))
    for folder in (model, adapter, run):
        folder.mkdir()
    stage = Stage(str(model), adapters=(adapter,), run=run)
    assert mixer_of(stage) is None
    for folder in (model, adapter, run):
        (folder / FILE).write_text("")
        assert mixer_of(stage) == folder / FILE


# ---- from the command line to the second stage


@pytest.fixture
def old(here: Path) -> Path:
    """Two files of old text in the working folder."""
    for name, count in (("code", 20), ("prose", 30)):
        tiny.jsonl(
            here / f"{name}.jsonl",
            ({"text": f"{name} number {n} sat on the mat"} for n in range(count)),
        )
    return here


def test_freeze_and_show(old: Path, holdfast: Callable[..., Any]) -> None:
    made = holdfast("mixer", "freeze", "py=code.jsonl", "prose.jsonl", "--share", "py=0.25",
                    "--out", "mixer.yaml")  # fmt: skip
    assert (made.code, made.err) == (0, "")
    assert "py: 25.00%" in made.out
    shown = holdfast("mixer", "show", "mixer.yaml", "--json")
    found = json.loads(shown.out)
    assert (shown.code, found["changed"]) == (0, [])
    assert {name: domain["share"] for name, domain in found["domains"].items()} == {
        "prose": 0.75,
        "py": 0.25,
    }
    (old / "code.jsonl").write_text('{"text": "other"}\n')
    changed = holdfast("mixer", "show", "mixer.yaml")
    assert changed.code == 2
    assert "changed: 'code.jsonl' is not what was frozen" in changed.out
    for words, said in (
        (["code.jsonl", "--out", "mixer.yaml"], "exists already"),
        (["code.jsonl", "--share", "x", "--out", "m.yaml"], "'x' is not domain=number"),
        (["=code.jsonl", "--out", "m.yaml"], "is not domain=source"),
        (["cod.jsonl", "--out", "m.yaml"], "no such file"),
        (["code.jsonl", "prose.jsonl", "--out", "m.yaml"], "--model: missing"),
    ):
        refused = holdfast("mixer", "freeze", *words)
        assert (refused.code, refused.out) == (2, "")
        assert said in refused.err
        assert not (old / "m.yaml").exists()


def test_every_later_stage_replays_the_same_mix(
    old: Path, holdfast: Callable[..., Any], quick: list[str]
) -> None:
    """The file lies in the run folder and beside the adapter; the second stage finds it there."""
    frozen = holdfast("mixer", "freeze", "code.jsonl", "prose.jsonl", "--model", "tiny",
                      "--out", "mixer.yaml")  # fmt: skip
    assert frozen.code == 0, frozen.err
    tiny.jsonl(old / "held.jsonl", ({"text": f"held {n} back"} for n in range(9)))
    canary = "canary.sources=[{path: held.jsonl, domain: latin}]"
    given = ["--data=lesson.jsonl", *quick]
    first = holdfast("train", "--model=tiny", *given, "--out=one", canary,
                     "levers.replay.mixer=mixer.yaml")  # fmt: skip
    assert first.code == 0, first.err
    assert "replaying the mix of mixer.yaml" in first.out
    assert "came with the model" not in first.out
    assert "warning: in the canary but not replayed: latin" in first.out
    assert "in the canary but not replayed: latin" in (old / "one" / "report.html").read_text()
    text = (old / "mixer.yaml").read_text()
    assert [(old / "one" / f).read_text() for f in (FILE, f"adapter/{FILE}")] == [text, text]
    (old / "mixer.yaml").unlink()
    second = holdfast("train", "--model=one", *given, "--out=two")
    assert second.code == 0, second.err
    assert "replaying the mix of one/mixer.yaml (it came with the model)" in second.out
    assert (old / "two" / FILE).read_text() == text
    recipe = yaml.safe_load((old / "two" / "recipe.yaml").read_text())
    assert recipe["levers"]["replay"]["mixer"] == "one/mixer.yaml"
    budget = json.loads(
        holdfast("train", "--model=two/adapter", *given, "--out=three", "--dry-run", "--json").out
    )["plan"]["streams"]
    shares = {s["name"]: s["share"] for s in budget if s["name"].startswith("replay/")}
    domains = yaml.safe_load(text)["domains"]
    assert shares == pytest.approx({f"replay/{n}": 0.2 * d["share"] for n, d in domains.items()})
    (old / "code.jsonl").write_text('{"text": "other"}\n')
    refused = holdfast("train", "--model=two", *given, "--out=four")
    assert refused.code == 2
    assert "'code.jsonl' is not what was frozen" in refused.err
    assert not (old / "four").exists()


def test_a_second_stage_may_do_without(
    old: Path, holdfast: Callable[..., Any], quick: list[str], finished_run: Path
) -> None:
    """Off is off; sources of its own are told; a recipe that cannot replay it is refused."""
    shutil.copytree(finished_run, old / "one")
    made = holdfast("mixer", "freeze", "code.jsonl", "--out", "one/mixer.yaml")
    assert made.code == 0, made.err
    words = ["model=one", "data=lesson.jsonl", "out=two", *quick]
    plans = {
        setting: holdfast("train", *words, *setting.split(), "--dry-run", "--json")
        for setting in ("", "levers.replay=none", "levers=none")
    }
    replayed = {
        setting: any(
            s["name"].startswith("replay/") for s in json.loads(plan.out)["plan"]["streams"]
        )
        for setting, plan in plans.items()
    }
    assert replayed == {"": True, "levers.replay=none": False, "levers=none": False}
    own = holdfast("train", *words, "levers.replay.sources=[prose.jsonl]", "--dry-run", "--json")
    assert "the model came with a mixer, 'one/mixer.yaml', but" in own.err.replace("\n", " ")
    refused = holdfast("validate", *words, "levers.kl_anchor=none")
    assert refused.code == 2
    assert "came with the mixer 'one/mixer.yaml', but levers.replay.loss: 'kl' needs" in refused.err
