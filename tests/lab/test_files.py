"""The lab's files: what is in them and that they are whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from holdfast.lab import corpus, write_files
from holdfast.lab.files import CANARIES, REPLAY_DOCUMENTS
from holdfast.lab.generators import DOMAINS
from holdfast.lab.heldout import is_canary
from holdfast.lab.lessons import LESSONS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    paths = write_files(tmp_path_factory.mktemp("lab") / "new", counterexamples=50)
    return {name: read(path) for name, path in paths.items()}


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_four_are_written(files: dict[str, list[Any]]):
    assert set(files) == {"lesson", "probes", "canary", "replay"}
    assert len(files["lesson"]) == LESSONS["verbs"].count + 50
    assert all(set(row) == {"prompt", "completion"} for row in files["lesson"])


def test_a_canary_has_as_many_documents_of_each_domain_as_are_asked_for(tmp_path: Path):
    paths = write_files(tmp_path / "few", documents_a_domain=9)
    assert Counter(row["domain"] for row in read(paths["canary"])) == dict.fromkeys(DOMAINS, 9)


def test_probe_ids_are_unique_and_every_probe_is_there(files: dict[str, list[Any]]):
    items = files["probes"]
    assert len({item["id"] for item in items}) == len(items)
    assert {item["probe"] for item in items} == {
        *DOMAINS, "irregular_verbs", "over_application", "regular_control"
    }  # fmt: skip


def test_canaries_are_held_out_and_replay_is_new_training_text(files: dict[str, list[Any]]):
    assert Counter(row["domain"] for row in files["canary"]) == dict.fromkeys(DOMAINS, CANARIES)
    assert len({row["text"] for row in files["canary"]}) == len(files["canary"])
    assert all(is_canary(row["text"]) for row in files["canary"])
    assert len(files["replay"]) == REPLAY_DOCUMENTS
    assert not any(is_canary(row["text"]) for row in files["replay"])
    own = {document.text for document, _ in zip(corpus(0, "train"), range(2000), strict=False)}
    assert not own & {row["text"] for row in files["replay"]}


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path: Path):
    first = {name: path.read_bytes() for name, path in write_files(tmp_path, seed=4).items()}
    again = {name: path.read_bytes() for name, path in write_files(tmp_path, seed=4).items()}
    assert first == again
    assert len(list(tmp_path.iterdir())) == len(first)
