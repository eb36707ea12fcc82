"""What a cell of the comparison gives an arm to train with, and what it keeps from it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "forgetting"))

import cell

from holdfast.demo import DOCUMENTS
from holdfast.lab.files import CANARIES


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_an_arm_watches_is_not_what_it_is_judged_by(tmp_path: Path) -> None:
    files = cell._files(tmp_path, "facts", 1, watched=True)
    judged, watched = ({row["text"] for row in rows(files[name])} for name in ("canary", "watched"))
    assert not judged & watched
    per_domain = (Counter(row["domain"] for row in rows(files[n])) for n in ("canary", "watched"))
    assert [set(count.values()) for count in per_domain] == [{CANARIES}, {DOCUMENTS}]
    assert cell._files(tmp_path / "other", "facts", 1).keys() == files.keys() - {"watched"}


def test_no_replay_has_the_domains_that_are_left_out(tmp_path: Path) -> None:
    files = cell._files(tmp_path, "facts", 1)
    domains = {name: {row["domain"] for row in rows(files[name])} for name in ("replay", "all")}
    assert domains["all"] - domains["replay"] == set(cell.LEFT_OUT)
