"""Files, folders and hub ids: each is read, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from holdfast.data.readers import local_path
from holdfast.data.rows import Source, iter_rows
from holdfast.errors import RequestError


def texts(source: Source) -> list[str]:
    return [row.content["text"] for row in iter_rows(source)]


def write_parquet(file: Path, *values: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": list(values), "tools": [None] * len(values)}), file)


def write_lines(file: Path, *values: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", "a", "b")
    rows = list(iter_rows(Source(path=str(tmp_path / "train.parquet"))))
    assert [row.where for row in rows] == [f"{tmp_path}/train.parquet row {i}" for i in (0, 1)]
    assert rows[1].content == {"text": "b"}


def test_a_table_gives_a_call_no_arguments_that_only_other_calls_have(tmp_path: Path) -> None:
    """Arrow joins the arguments of all calls into one type, and fills it up with nulls."""
    calls = [{"name": "now", "arguments": {"tz": "CET"}}, {"name": "in", "arguments": {"at": "x"}}]
    messages = [
        [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [one]},
        ]
        for one in ({"type": "function", "function": call} for call in calls)
    ]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "train.parquet")
    rows = list(iter_rows(Source(path=str(tmp_path / "train.parquet"))))
    found = [row.content["messages"][1]["tool_calls"][0]["function"] for row in rows]
    assert found == calls


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(RequestError, match="not a readable parquet file"):
        texts(Source(path=str(tmp_path / "x.parquet")))


def test_a_json_array_and_json_lines_named_json(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text('\n [{"text": "a"}, {"text": "b"}]')
    write_lines(tmp_path / "lines.json", "c")
    rows = list(iter_rows(Source(path=str(tmp_path / "array.json"))))
    assert [row.where for row in rows] == [f"{tmp_path}/array.json item {i}" for i in (0, 1)]
    assert texts(Source(path=str(tmp_path / "lines.json"))) == ["c"]
    (tmp_path / "torn.json").write_text('[{"text": "a"}')
    with pytest.raises(RequestError, match="is not JSON"):
        texts(Source(path=str(tmp_path / "torn.json")))


def test_a_folder_reads_only_its_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "part-1.jsonl", "a")
    write_parquet(tmp_path / "part-2.parquet", "b")
    write_lines(tmp_path / "held_out" / "test-00.jsonl", "t")
    write_lines(tmp_path / ".cache" / "x.jsonl", "hidden")
    folder = Source(path=str(tmp_path))
    assert texts(folder) == ["a", "b"]
    assert texts(folder.model_copy(update={"split": "test"})) == ["t"]
    with pytest.raises(RequestError, match="no files of split 'dev'; this folder has test, train"):
        texts(folder.model_copy(update={"split": "dev"}))


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RequestError, match="no data in this folder"):
        texts(Source(path=str(tmp_path)))


def test_saved_datasets(tmp_path: Path) -> None:
    one = Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "both")
    assert texts(Source(path=str(tmp_path / "one"), limit=1)) == ["a"]
    assert texts(Source(path=str(tmp_path / "both"), split="test")) == ["b"]
    with pytest.raises(RequestError, match="no split 'tset'; did you mean 'test'"):
        texts(Source(path=str(tmp_path / "both"), split="tset"))


@pytest.mark.parametrize("name", ["x.pkl", "weights.pt", "model.bin"])
def test_pickles_are_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match="can run code when they are loaded"):
        local_path(name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(RequestError, match=r"cannot read '\.csv' files; allowed: \.jsonl"):
        local_path(str(tmp_path / "x.csv"))


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write_lines(tmp_path / "lessons.jsonl", "a")
    with pytest.raises(RequestError, match=r"no such file.*did you mean '.*lessons\.jsonl'"):
        local_path(str(tmp_path / "leson.jsonl"))


@pytest.mark.parametrize("setting", [{"split": "test"}, {"name": "main"}])
def test_a_setting_that_would_be_ignored_is_refused(
    tmp_path: Path, setting: dict[str, str]
) -> None:
    write_lines(tmp_path / "x.jsonl", "a")
    with pytest.raises(RequestError, match=f"'{next(iter(setting))}' is .*remove it"):
        texts(Source.model_validate({"path": str(tmp_path / "x.jsonl"), **setting}))


def test_a_hub_id_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub\nlong trace")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(RequestError) as caught:
        texts(Source(path="someone/data"))
    (problem,) = caught.value.problems
    assert problem.startswith("someone/data: no such local file or folder")
    assert "Couldn't reach 'someone/data' on the Hub)" in problem
    assert "local .jsonl or .parquet path" in problem


def test_a_hub_id_is_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(path: str, name: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((path, name, split, streaming))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert texts(Source(path="someone/data", name="main", split="test")) == ["a", "b"]
    assert texts(Source(path="someone/data", limit=1)) == ["a"]
    assert asked == [
        ("someone/data", "main", "test", False),
        ("someone/data", None, "train", True),
    ]
