"""The run folder: nothing half written, every reading once, full disks named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from holdfast.artifact import RunFolder, full_disk_named, write_text
from holdfast.errors import HoldfastError, RequestError
from holdfast.meters import Reading

RESOLVED = {"model": {"path": "tiny"}, "resolved": {"steps": 3, "rate": 1e-05}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def reading(step: int, value: float = 1.0, name: str = "prose", meter: str = "canary") -> Reading:
    return Reading(meter, name, "sealed", step, value, 0.1, 4, "nats", tags=("canary",))


class PowerCut(BaseException):
    """The machine stops here."""


def power_cut(*_: Any) -> None:
    raise PowerCut


# ---- whole or not there


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    file = tmp_path / "recipe.yaml"
    write_text(file, "old")
    monkeypatch.setattr(os, at, power_cut)
    with pytest.raises(PowerCut):
        write_text(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_text(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_folder_is_replaced_whole(folder: RunFolder) -> None:
    for text in ("first", "second"):
        with folder.replacing("adapter") as fresh:
            assert not list(fresh.iterdir())
            (fresh / text).write_text(text)
            assert not (folder.path / "adapter" / text).exists()
    assert [p.name for p in (folder.path / "adapter").iterdir()] == ["second"]


@pytest.mark.parametrize("error", [ValueError, PowerCut])
def test_a_block_that_fails_leaves_the_old_folder(folder: RunFolder, error: Any) -> None:
    with folder.replacing("adapter") as fresh:
        (fresh / "weights").write_text("old")
    before = sorted(folder.path.iterdir())

    def half_a_folder() -> None:
        with folder.replacing("adapter") as fresh:
            (fresh / "weights").write_text("new")
            raise error

    with pytest.raises(error):
        half_a_folder()
    assert (folder.path / "adapter" / "weights").read_text() == "old"
    assert sorted(folder.path.iterdir()) == before


# ---- the folder itself


def test_a_new_folder_is_made_with_its_parents_or_taken_when_empty(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path / "runs" / "one").data.is_dir()
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty").data.is_dir()


def test_a_folder_in_use_is_refused(tmp_path: Path, folder: RunFolder) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RequestError, match="is not empty; give another folder"):
        RunFolder.create(folder.path)
    folder.write_recipe(RESOLVED)
    with pytest.raises(RequestError, match="is not empty; give --resume to continue it, or"):
        RunFolder.create(folder.path)
    with pytest.raises(RequestError, match="below a file"):
        RunFolder.create(tmp_path / "file" / "run")


def test_only_a_run_can_be_opened(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(RequestError, match=r"not a run folder \(no recipe.yaml in it\)"):
        RunFolder.open(folder.path)
    folder.write_recipe(RESOLVED)
    assert RunFolder.open(folder.path).read_recipe() == RESOLVED
    for text in ("model: tiny\n", "[", "\x00", "- a list\n"):
        folder.recipe.write_text(text)
        with pytest.raises(RequestError, match="not written by a run"):
            RunFolder.open(folder.path).read_recipe()


@pytest.mark.parametrize(
    ("error", "resumable", "left"),
    [
        (RequestError, False, False),
        (RequestError, True, False),
        (KeyboardInterrupt, False, False),  # nothing yet that a resumed run could start from
        (KeyboardInterrupt, True, True),
        (RuntimeError, True, True),
    ],
)
def test_what_is_left_of_a_beginning_can_be_resumed(
    folder: RunFolder, error: Any, resumable: bool, left: bool
) -> None:
    def begin() -> None:
        with folder.given_up_if_refused():
            (folder.data / "rows").write_text("rows")
            if resumable:
                folder.write_recipe(RESOLVED)
                folder.append([reading(0)])
            raise error("stop")

    with pytest.raises(error):
        begin()
    assert folder.path.exists() is left


def test_a_refused_request_leaves_what_is_not_its_own(folder: RunFolder) -> None:
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError), folder.given_up_if_refused():
        raise RequestError("no")
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


# ---- readings

keys = st.tuples(
    st.sampled_from(["canary", "loss"]), st.sampled_from(["a", "b"]), st.integers(0, 6)
)
batches = st.lists(st.lists(st.tuples(keys, st.floats(allow_nan=False))), max_size=6)


@given(batches, st.integers(0, 6), batches)
@settings(max_examples=40, deadline=None)
def test_merging_and_rewinding_keep_each_reading_once_and_the_latest(
    tmp_path_factory: pytest.TempPathFactory, first: Any, step: int, second: Any
) -> None:
    """Against a dict by step, meter and name: later values replace, a rewind drops later steps."""
    folder = RunFolder.create(tmp_path_factory.mktemp("merge") / "run")
    expected: dict[Any, float] = {}
    for part in (first, second):
        for batch in part:
            folder.merge(reading(s, value, name, meter) for (meter, name, s), value in batch)
            expected |= dict(batch)
        if part is first:
            folder.rewind_readings(step)
            expected = {key: value for key, value in expected.items() if key[2] <= step}
    found = [((r["meter"], r["name"], r["step"]), r["value"]) for r in folder.records()]
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_a_reading_is_written_without_its_items(folder: RunFolder) -> None:
    one = Reading(
        "probe", "sums", "sealed", 3, 0.5, None, 2, "accuracy", items={"1": 1.0, "2": 0.0}
    )
    folder.append([one])
    (record,) = folder.records()
    assert record == {
        "meter": "probe",
        "name": "sums",
        "split": "sealed",
        "step": 3,
        "value": 0.5,
        "stderr": None,
        "n": 2,
        "unit": "accuracy",
        "seconds": 0.0,
        "tags": [],
    }


@pytest.mark.parametrize("tear", [1, 10, 60])
def test_a_torn_last_line_is_left_out_and_mended(folder: RunFolder, tear: int) -> None:
    folder.append([reading(0), reading(1), reading(2)])
    folder.readings.write_bytes(folder.readings.read_bytes()[:-tear])
    kept = 3 if tear == 1 else 2  # the line feed alone is no loss
    assert [record["step"] for record in folder.records()] == [0, 1, 2][:kept]
    folder.rewind_readings(5)
    folder.append([reading(3)])
    assert [record["step"] for record in folder.records()] == [*range(kept), 3]


def test_zeros_that_a_power_cut_left_are_no_reading(folder: RunFolder) -> None:
    folder.append([reading(0)])
    with folder.readings.open("ab") as file:
        file.write(bytes(40))
    assert [record["step"] for record in folder.records()] == [0]


def test_the_bases_readings_come_back_item_by_item(folder: RunFolder) -> None:
    items, clusters = {"1": 1.0, "2": 0.0}, {"1": "c", "2": "c"}
    one = Reading(
        "probe", "p", "sealed", 0, 0.5, 0.1, 2, tags=("rare",), items=items, clusters=clusters
    )
    assert folder.load_before() is None
    folder.save_before([one, reading(0)])
    found = folder.load_before()
    assert found == [one, reading(0)]
    assert (found[0].items, found[0].clusters) == (items, clusters)


# ---- disks


def fails(number: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, RequestError, "the disk is full while writing '.*'; free some space"),
        (errno.EDQUOT, RequestError, "the disk is full"),
        (errno.EACCES, RequestError, "cannot be written"),
        (errno.EROFS, RequestError, "cannot be written"),
        (errno.EIO, HoldfastError, "Input/output error"),
    ],
)
def test_what_the_disk_refuses_is_said_in_one_line(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int, kind: Any, said: str
) -> None:
    folder.append([reading(0)])
    monkeypatch.setattr(os, "fsync", fails(number))
    for write in (
        lambda: folder.append([reading(1)]),
        lambda: folder.merge([reading(1)]),
        lambda: folder.write_recipe(RESOLVED),
        lambda: folder.save_before([reading(0)]),
    ):
        with pytest.raises(HoldfastError, match=said) as caught:
            write()
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert str(folder.path) in str(caught.value)


def test_a_full_disk_leaves_the_old_artifact(folder: RunFolder) -> None:
    with folder.replacing("adapter") as fresh:
        (fresh / "weights").write_text("old")
    with pytest.raises(RequestError, match="the disk is full"), folder.replacing("adapter"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (folder.path / "adapter" / "weights").read_text() == "old"


def test_torch_and_safetensors_meet_a_full_disk_in_their_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both messages were seen on a full tmpfs: torch 2.13's does not speak of space at all."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    torch_error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576")
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    for error in (torch_error, SafetensorError(words)):
        with pytest.raises(RequestError, match="the disk is full"), full_disk_named(tmp_path / "x"):
            raise error


def test_an_error_that_is_not_the_disks_passes_unchanged(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), ValueError("no"), RequestError("yours")):
        with pytest.raises(type(error)) as caught, full_disk_named(tmp_path):
            raise error
        assert caught.value is error


def test_torch_itself_passes_through_on_a_disk_with_room(tmp_path: Path) -> None:
    with full_disk_named(tmp_path):
        torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt")["a"].tolist() == [0, 0, 0]
    write_text(tmp_path / "b.json", json.dumps({"b": 1}))
    assert json.loads((tmp_path / "b.json").read_text()) == {"b": 1}
