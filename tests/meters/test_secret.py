"""What must stay unseen: canary rows that are read, and probe items with their right answers."""

from __future__ import annotations

from pathlib import Path

from holdfast.data.rows import Source
from holdfast.measure import row_hash, text_documents
from holdfast.meters.canary import Canary
from holdfast.meters.secret import canary_rows, secret_texts
from tiny import jsonl, letters


def test_canary_rows_and_probe_items(tmp_path: Path) -> None:
    canary = jsonl(
        tmp_path / "canary.jsonl",
        [{"text": f"{domain} {i}", "domain": domain} for i in range(10) for domain in "ab"],
    )
    probes = jsonl(
        tmp_path / "probes.jsonl",
        [
            {"id": "1", "probe": "sums", "kind": "exact", "prompt": "2 + 2 =", "target": " 4"},
            {
                "id": "1",
                "probe": "capitals",
                "kind": "choice",
                "prompt": [{"role": "user", "content": "Peru?"}],
                "choices": ["Quito", "Lima"],
                "answer": 1,
            },
        ],
    )
    settings = Canary(sources=[Source(path=str(canary))], max_documents=8)
    found = secret_texts(settings, [str(probes)])
    assert [t.text.split() for t in found[-2:]] == [["2", "+", "2", "=", "4"], ["Peru?", "Lima"]]
    assert [t.where for t in found[-2:]] == ["probe 'sums', item '1'", "probe 'capitals', item '1'"]
    assert sorted(t.text.strip() for t in found[:-2]) == sorted(
        f"{domain} {i}" for i in range(8) for domain in "ab"
    )
    assert found[0].where == f"{canary} line 1"


def test_rows_without_a_response_and_repeats_do_not_use_up_the_documents(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "domain": "a"} for i in range(12)]
    repeats = [rows[0]] * 5
    empty = [{"prompt": "p", "completion": "", "domain": "a"}] * 5
    file = jsonl(tmp_path / "canary.jsonl", [*repeats, *empty, *rows])
    settings = Canary(sources=[Source(path=str(file))], max_documents=8)
    assert [t.text.strip() for t in secret_texts(settings, [])] == [f"text {i}" for i in range(8)]
    again = Canary(sources=[*settings.sources, *settings.sources], max_documents=100)
    assert len(secret_texts(again, [])) == 12


def test_every_row_that_is_read_as_held_out_is_secret(tmp_path: Path) -> None:
    rows = [{"text": f"word{i // 4} " * 5, "domain": "ab"[i % 2]} for i in range(60)]
    file = jsonl(tmp_path / "canary.jsonl", [*rows, *[{"text": f"late {i}"} for i in range(20)]])
    settings = Canary(sources=[Source(path=str(file))], max_documents=8)
    read = text_documents(settings, letters(), 32)
    assert {one.cluster for one in read} == {row_hash(row) for row in canary_rows(settings)}


def test_without_files_there_is_nothing_secret() -> None:
    assert secret_texts(Canary(), []) == []
