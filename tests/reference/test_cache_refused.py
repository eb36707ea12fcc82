"""Every cache that does not fit, through the command line: exit code 2, one line, nothing written.

A case changes the working folder in which `stored` was built by `holdfast cache build`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from holdfast.reference import build as building
from holdfast.reference import cache as reading

ASKED = ["--model=tiny", "--data=lesson.jsonl"]
CACHED = "levers.kl_anchor.cache=stored"


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_lesson: Path,
    quick: list[str],
) -> Path:
    """A working folder with the model, the lesson and a whole cache of two parts."""
    from holdfast.cli import main

    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(tiny_model, folder / "tiny")
    shutil.copy(tiny_lesson, folder / "lesson.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(building, "PART_POSITIONS", 60)
        assert main(["cache", "build", *ASKED, *quick, "--on=both", "--out=stored"]) == 0
    assert len(list((folder / "stored").glob("part-*"))) >= 2
    return folder


@pytest.fixture
def work(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the current folder."""
    folder = shutil.copytree(built, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def edited(file: Path, change: Callable[[Any], None]) -> None:
    """A JSON file with a change."""
    found = json.loads(file.read_text(encoding="utf-8"))
    change(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def another_model() -> None:
    file = Path("tiny/model.safetensors")
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] += 0.01
    save_file(weights, file, metadata={"format": "pt"})


def another_template() -> None:
    Path("tiny/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )


def another_tokenizer() -> None:
    """One merge fewer."""
    edited(Path("tiny/tokenizer.json"), lambda found: found["model"]["merges"].pop())


def truncated() -> None:
    file = Path("stored/part-00001.parquet")
    file.write_bytes(file.read_bytes()[:-7])


def flipped(part: str = "stored/part-00000.parquet") -> None:
    """A byte of the first block."""
    file = Path(part)
    found = bytearray(file.read_bytes())
    found[60] ^= 1
    file.write_bytes(found)


def missing() -> None:
    Path("stored/part-00001.parquet").unlink()


def older() -> None:
    def change(found: dict[str, Any]) -> None:
        found["version"] = reading.VERSION - 1
        found["checksum"] = reading._checksum(found)

    edited(Path("stored/cache.json"), change)


def a_shard() -> None:
    def change(found: dict[str, Any]) -> None:
        found["shard"] = [1, 2]
        found["checksum"] = reading._checksum(found)

    edited(Path("stored/cache.json"), change)


def unchanged() -> None:
    pass


CASES: dict[str, tuple[Callable[[], None], list[str], str]] = {
    "model": (another_model, [], "its model weights or config ("),
    "tokenizer": (another_tokenizer, [], "its tokenizer ("),
    "template": (another_template, [], "its chat template ("),
    "temperature": (
        unchanged,
        ["levers.kl_anchor.divergence.temperature=2"],
        "its temperature (1)",
    ),
    "rows": (unchanged, ["seed=7"], "is not in it; build it from this run's recipe"),
    "truncated part": (truncated, [], "part-00001.parquet' has "),
    "missing part": (missing, [], "part-00001.parquet' is missing"),
    "older format": (older, [], f"this holdfast reads {reading.VERSION}; build it anew"),
    "shard": (a_shard, [], "is shard 1 of 2; join them first"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_refuses_it_before_it_starts(
    work: Path, quick: list[str], holdfast: Callable[..., Any], case: str
) -> None:
    change, words, said = CASES[case]
    change()
    found = holdfast("train", *ASKED, *quick, "--out=run", CACHED, *words)
    assert found.code == 2, found.err
    assert found.err.startswith("holdfast: cache")
    assert said in found.err
    assert found.err.count("\n") == 1
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flipped, "part-00000.parquet' is damaged in block 0; delete this file"),
        (truncated, "part-00001.parquet' has "),
        (missing, "part-00001.parquet' is missing"),
    ],
)
def test_check_names_the_damaged_file_and_the_same_build_mends_it(
    work: Path,
    quick: list[str],
    holdfast: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[], None],
    said: str,
) -> None:
    sound = {file.name: file.read_bytes() for file in Path("stored").glob("part-*")}
    change()
    found = holdfast("cache", "check", "stored")
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1
    monkeypatch.setattr(building, "PART_POSITIONS", 60)
    again = holdfast("cache", "build", *ASKED, *quick, "--on=both", "--out=stored")
    assert again.code == 0, again.err
    assert sound == {file.name: file.read_bytes() for file in Path("stored").glob("part-*")}


def test_a_flipped_byte_is_never_trained_on(
    work: Path, quick: list[str], holdfast: Callable[..., Any]
) -> None:
    """Also where only a later step reads it: the run ends with its name."""
    for file in Path("stored").glob("part-*"):
        flipped(str(file))
    found = holdfast("train", *ASKED, *quick, "--out=run", CACHED)
    assert found.code == 2
    assert "is damaged in block 0" in found.err
    assert not (work / "run" / "verdict.json").exists()


def test_an_interrupted_build_says_that_it_can_go_on_and_does(
    work: Path, quick: list[str], holdfast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["cache", "build", *ASKED, *quick, "--on=both"]
    monkeypatch.setattr(building, "PART_POSITIONS", 60)
    plainly, computed = building.store_batch, []

    def interrupted(*args: Any) -> Any:
        computed.append(1)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return plainly(*args)

    monkeypatch.setattr(building, "store_batch", interrupted)
    first = holdfast(*words, "--out=again")
    assert first.code == 130
    assert "the same command continues it" in first.err
    assert not Path("again/cache.json").exists()
    assert holdfast(*words, "--out=again").code == 0
    stored, again = (
        {file.name: file.read_bytes() for file in Path(name).glob("part-*")}
        for name in ("stored", "again")
    )
    assert again == stored
    assert len(computed) == len(stored) + 1


def test_shards_are_merged_to_what_one_build_writes(
    work: Path, quick: list[str], holdfast: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PART_POSITIONS", 60)
    for i in (1, 2):
        words = [*ASKED, *quick, "--on=both", f"--shard={i}/2", f"--out=s{i}"]
        assert holdfast("cache", "build", *words).code == 0
    alone = holdfast("cache", "merge", "s1", "--out=whole")
    assert alone.code == 2
    assert alone.err.startswith("holdfast: cache merge: shard 2/2 is missing")
    assert not Path("whole").exists()
    assert holdfast("cache", "merge", "s2", "s1", "--out=whole").code == 0
    stored, whole = (
        {file.name: file.read_bytes() for file in Path(name).iterdir() if file.is_file()}
        for name in ("stored", "whole")
    )
    assert whole == stored
