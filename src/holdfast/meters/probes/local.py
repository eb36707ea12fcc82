"""Local files in place of the hub's data sets."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.data.readers import Malformed, files_of, local_path, read_file
from holdfast.errors import RequestError

Rows = list[dict[str, Any]]

SUBJECTS = ("subject", "UID", "language", "subset")
"""Columns of a local file that say which of a group's tasks a row belongs to."""


def _lambada(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{row['context']} {row['continuation']}"} if "context" in row else row


def _pubmedqa(row: dict[str, Any]) -> dict[str, Any]:
    if "question" not in row:
        return row
    return {
        "QUESTION": row["question"],
        "CONTEXTS": [row["context"]],
        "final_decision": row.get("answer", row.get("final_decision")),
    }


_ADAPTED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "EleutherAI/lambada_openai": _lambada,
    "bigbio/pubmed_qa": _pubmedqa,
}
"""Data sets that are also passed around with other columns than the hub's."""


def read_rows(data: Sequence[str]) -> dict[str | None, Rows]:
    """The rows of local files by split; None for those given without one.

    Raises:
        RequestError: a file that is not there or not readable, or a faulty line of one.
    """
    found: dict[str | None, Rows] = {}
    for word in data:
        split, equals, path = word.partition("=")
        named: str | None = split if equals and _exists(path) else None
        path = path if named else word
        local = local_path(path)
        if local is None:
            raise RequestError(f"--data: '{path}' is no local file or folder; give a .jsonl file")
        files = [local] if local.is_file() else files_of(local, named or "test")
        rows = found.setdefault(named, [])
        for file in files:
            for where, record in read_file(file, str(file)):
                if isinstance(record, Malformed) or not isinstance(record, dict):
                    what = record.problem if isinstance(record, Malformed) else "is no object"
                    raise RequestError(f"{where}: {what}")
                rows.append(record)
    return found


def _exists(path: str) -> bool:
    """Whether a file or folder is there; a wrong name raises."""
    local = local_path(path) if path else None
    return local is not None


def splits_of(
    config: dict[str, Any], given: dict[str | None, Rows], shots: int | None, seed: int
) -> Any:
    """The data set of one task by split, from local rows; {} where they have none of it."""
    from datasets import Dataset, DatasetDict

    adapt = _ADAPTED.get(str(config.get("dataset_path")), dict)
    mine = {
        split: [adapt(row) for row in rows if _belongs(row, config.get("dataset_name"))]
        for split, rows in given.items()
    }
    asked_of = config.get("test_split") or config.get("validation_split")
    fewshot = config.get("fewshot_config")
    named = fewshot.get("split") if isinstance(fewshot, dict) else None
    shown = (
        config.get("fewshot_split")
        or named
        or config.get("training_split")
        or config.get("validation_split")
    )
    rows = mine.get(asked_of) or mine.get(None) or []
    if not rows:
        return {}
    shots = config.get("num_fewshot") or 0 if shots is None else shots
    examples = mine.get(shown) if shown != asked_of else None
    if shots and examples is None and not (fewshot or {}).get("samples"):
        spare = shots + 1  # lm-eval draws one more, to leave the question itself out
        if len(rows) <= spare:
            raise RequestError(
                f"probes import: {len(rows)} rows of '{config['task']}' cannot spare {spare} as "
                f"examples; give those apart, such as --data {shown or 'train'}=FILE, or --shots 0"
            )
        apart = set(random.Random(seed).sample(range(len(rows)), spare))
        examples = [row for i, row in enumerate(rows) if i in apart]
        rows = [row for i, row in enumerate(rows) if i not in apart]
    splits = {
        split: Dataset.from_list(rows if examples is None else examples)
        for split in (config.get("training_split"), config.get("validation_split"), shown)
        if split
    }
    return DatasetDict({**splits, asked_of: Dataset.from_list(rows)})


def _belongs(row: dict[str, Any], subset: str | None) -> bool:
    columns = [column for column in SUBJECTS if column in row]
    return subset is None or not columns or any(row[column] == subset for column in columns)
