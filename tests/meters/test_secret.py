"""What must stay unseen: canary rows that are read, and probe items with their right answers."""

from __future__ import annotations

from pathlib import Path

from holdfast.data.rows import Source
from holdfast.meters.canary import Canary
from holdfast.meters.secret import secret_texts
from tiny import jsonl


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


def test_without_files_there_is_nothing_secret() -> None:
    assert secret_texts(Canary(), []) == []
