"""`holdfast gate BASE TUNED`: the verdict, what it writes, and that it fails closed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from safetensors.torch import load_file, save_file

import tiny
from holdfast.gate import release as releasing
from holdfast.measure import Measure

Cli = Callable[..., Any]
WIDE = {"margins": {"canary": "50%", "sums": "50%", "words": "20pt"}}


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, with a ledger of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def gate_file(made: Path, **more: Any) -> str:
    probes = [str(made / "sums.jsonl"), str(made / "words.jsonl")]
    terms = {"probes": probes, "canary": str(made / "prose.jsonl"), **WIDE, **more}
    Path("gate.yaml").write_text(yaml.safe_dump(terms))
    return "gate.yaml"


def left() -> dict[str, Any]:
    """What `verdict.json` holds."""
    found: dict[str, Any] = json.loads(Path("verdict.json").read_text())
    return found


def test_a_pass_is_code_0_and_says_what_it_rests_on(made: Path, here: Path, holdfast: Cli) -> None:
    words = ["gate", str(made / "base"), str(made / "near"), "--gate", gate_file(made)]
    done = holdfast(*words, "--markdown", "m.md", "--junit", "j.xml")
    assert (done.code, done.err) == (0, "")
    assert "PASS" in done.out
    assert "the first for this base" in done.out
    found = left()
    assert (found["verdict"], found["exit_code"]) == ("PASS", 0)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {"prose", "sums", "words"}
    assert (rows["sums"]["n"], rows["words"]["n"]) == (40, 200)
    assert rows["prose"]["n"] < 40  # the other half was for choosing
    assert all(len(sha) == 64 for sha in found["sha256"].values())
    assert len(found["sha256"]) == 3
    assert "**PASS" in Path("m.md").read_text()
    suite = ET.parse("j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("4", "0")


def test_a_fail_is_code_3_everywhere(made: Path, here: Path, holdfast: Cli) -> None:
    words = ["gate", str(made / "base"), str(made / "far"), "--gate", gate_file(made)]
    done = holdfast(*words, "--junit", "j.xml", "--json")
    found = json.loads(done.out)
    assert (done.code, found["verdict"], left()["verdict"]) == (3, "FAIL", "FAIL")
    assert found == left()
    failed = {case.get("name") for case in ET.parse("j.xml").iter("testcase") if len(case) > 1}
    assert "prose" in failed
    verdict = [case for case in ET.parse("j.xml").iter("testcase") if case.get("name") == "verdict"]
    assert verdict[0].find("failure").get("type") == "FAIL"  # type: ignore[union-attr]


def test_too_little_to_tell_is_code_4_with_the_items_that_would_decide(
    made: Path, here: Path, holdfast: Cli
) -> None:
    terms = gate_file(made, margins={"canary": "50%", "sums": "50%", "words": "3pt"})
    done = holdfast("gate", str(made / "base"), str(made / "between"), "--gate", terms)
    assert (done.code, left()["verdict"]) == (4, "INCONCLUSIVE")
    (row,) = [row for row in left()["rows"] if row["name"] == "words"]
    assert row["items_needed"] > row["n"]
    assert f"about {row['items_needed']:,} items would decide" in row["reason"]


def test_the_options_go_over_the_file(made: Path, here: Path, holdfast: Cli) -> None:
    words = ["gate", str(made / "base"), str(made / "near"), "--gate", gate_file(made)]
    holdfast(*words, "--margin", "words=30pt", "--probes", str(made / "words.jsonl"),
             "--margin", "sums=1%")  # fmt: skip
    assert not Path("verdict.json").exists()  # sums is read no more, so its margin guards nothing
    Path("gate.yaml").write_text(yaml.safe_dump({"canary": str(made / "prose.jsonl")}))
    holdfast(*words, "--margin", "canary=60%", "--probes", str(made / "words.jsonl"),
             "--margin", "words=30pt")  # fmt: skip
    assert {row["name"]: row["margin_text"] for row in left()["rows"]} == {
        "prose": "60%", "words": "30pt"
    }  # fmt: skip


def test_a_target_must_rise_by_its_own_rule(made: Path, here: Path, holdfast: Cli) -> None:
    tiny.jsonl(here / "t.jsonl", [
        {"id": f"{n}", "probe": "lesson", "kind": "nll", "prompt": f"{n}", "target": " a.",
         "tags": ["target"]} for n in range(20)
    ])  # fmt: skip
    words = ["gate", str(made / "base"), str(made / "near"), "--canary", str(made / "prose.jsonl"),
             "--margin", "canary=50%", "--probes", "t.jsonl"]  # fmt: skip
    holdfast(*words)
    rows = {row["name"]: row for row in left()["rows"]}
    assert rows["lesson"]["margin"] is None
    assert rows["lesson"]["decisive"]
    Path("g.yaml").write_text("target: report\n")
    assert holdfast(*words, "--gate", "g.yaml").code == 0


# --- looks ---------------------------------------------------------------------------------------


def test_looks_are_counted_by_model_not_by_call(made: Path, here: Path, holdfast: Cli) -> None:
    file = gate_file(made)
    first = holdfast("gate", str(made / "base"), str(made / "near"), "--gate", file)
    again = holdfast("gate", str(made / "base"), str(made / "near"), "--gate", file)
    other = holdfast("gate", str(made / "base"), str(made / "far"), "--gate", file)
    assert "the first for this base" in first.out
    assert "the first for this base" in again.out
    assert "model 2 of this base" in other.out
    assert "up to 10%, not 5%" in other.out
    assert set(left()["looks"]["models"].values()) == {2}


# --- fails closed --------------------------------------------------------------------------------


def passed_before(made: Path, holdfast: Cli, *more: str) -> list[str]:
    """The words of a gate that has passed here once, with its files lying about."""
    words = ["gate", str(made / "base"), str(made / "near"), "--gate", gate_file(made), *more]
    assert holdfast(*words).code == 0
    assert left()["verdict"] == "PASS"
    return words


def nothing_left(*files: str) -> bool:
    return not any(Path(file).exists() for file in ("verdict.json", *files))


def test_a_crash_while_reading_leaves_no_verdict(
    made: Path, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = passed_before(made, holdfast, "--markdown", "m.md", "--junit", "j.xml")

    def crash(*_: Any, **__: Any) -> None:
        raise OSError("the machine is on fire")

    monkeypatch.setattr(Measure, "whole", crash)
    with pytest.raises(OSError, match="on fire"):
        holdfast(*words)
    assert nothing_left("m.md", "j.xml")


def test_a_probe_that_was_not_read_is_no_pass(
    made: Path, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = passed_before(made, holdfast)
    whole = Measure.whole
    lost = lambda *a, **k: [r for r in whole(*a, **k) if r.name != "sums"]  # noqa: E731
    monkeypatch.setattr(Measure, "whole", lost)
    done = holdfast(*words)
    assert done.code == 2
    assert "'sums' was to be judged, and nothing was read" in done.err
    assert nothing_left()


def test_a_probe_file_that_is_gone_is_no_pass(made: Path, here: Path, holdfast: Cli) -> None:
    words = passed_before(made, holdfast)
    done = holdfast(*words, "--probes", "gone.jsonl")
    assert (done.code, nothing_left()) == (2, True)
    assert "'gone.jsonl' does not exist" in done.err


def test_nan_is_no_pass(made: Path, here: Path, holdfast: Cli) -> None:
    words = passed_before(made, holdfast)
    words[2] = str(made / "nan")
    done = holdfast(*words)
    assert (done.code, nothing_left()) == (2, True)
    assert "not finite" in done.err


def test_a_value_that_is_not_a_number_is_no_pass(
    made: Path, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = passed_before(made, holdfast)
    whole = Measure.whole

    def broken(self: Measure, model: Any, step: int, **more: Any) -> Any:
        found = whole(self, model, step, **more)
        if step:
            found[-1].items[next(iter(found[-1].items))] = math.nan
        return found

    monkeypatch.setattr(Measure, "whole", broken)
    assert (holdfast(*words).code, nothing_left()) == (2, True)


def test_a_changed_item_file_is_no_pass(made: Path, here: Path, holdfast: Cli) -> None:
    passed_before(made, holdfast)
    recorded = left()["sha256"]
    mine = tiny.jsonl(here / "words.jsonl", [json.loads(line) for line in (
        made / "words.jsonl").read_text().splitlines()])  # fmt: skip
    words = ["gate", str(made / "base"), str(made / "near"), "--gate"]
    pinned = {Path(path).name: sha for path, sha in recorded.items()}
    probes = [str(made / "sums.jsonl"), str(mine)]
    assert holdfast(*words, gate_file(made, sha256=pinned, probes=probes)).code == 0
    mine.write_text(mine.read_text().replace('"answer": 1', '"answer": 0', 1))
    done = holdfast(*words, gate_file(made, sha256=pinned, probes=probes))
    assert (done.code, nothing_left()) == (2, True)
    assert "sha256: 'words.jsonl' has changed" in done.err
    done = holdfast(*words, gate_file(made, sha256={"wodrs.jsonl": "ab"}, probes=probes))
    assert (done.code, nothing_left()) == (2, True)
    assert "did you mean 'words.jsonl'?" in done.err


def test_a_file_that_changes_while_it_is_read_is_no_pass(
    made: Path, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tiny.jsonl(here / "mine.jsonl", [json.loads(line) for line in (
        made / "sums.jsonl").read_text().splitlines()])  # fmt: skip
    whole = Measure.whole

    def meddled(*args: Any, **more: Any) -> Any:
        mine.write_text(mine.read_text() + "\n")
        return whole(*args, **more)

    monkeypatch.setattr(Measure, "whole", meddled)
    file = gate_file(made, probes=str(mine), margins={"canary": "50%", "sums": "50%"})
    done = holdfast("gate", str(made / "base"), str(made / "near"), "--gate", file)
    assert (done.code, nothing_left()) == (2, True)
    assert "while the models were read" in done.err


def test_another_tokenizer_is_no_pass(made: Path, here: Path, holdfast: Cli) -> None:
    words = passed_before(made, holdfast)
    words[2] = str(made / "other")
    done = holdfast(*words)
    assert (done.code, nothing_left()) == (2, True)
    assert "tokenizers of BASE and TUNED differ" in done.err
    words[3:] = ["--canary", str(made / "prose.jsonl"), "--margin", "canary=100%"]
    assert holdfast(*words).code in (3, 4)
    assert left()["verdict"] != "PASS"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--margin", "wrods=3pt"], "'wrods' names nothing that is read"),
        (["--margin", "sums=3pt"], "write sums: 3%"),
        (["--margin", "words=-3pt"], "wrong sign"),
        (["--margin", "words=1pt"], "could never pass"),
        (["--dtype", "float23"], "--dtype"),
        (["--gate", "nowhere.yaml"], "'nowhere.yaml' does not exist"),
    ],
)
def test_a_wrong_word_is_one_line_and_no_verdict(
    extra: list[str], said: str, made: Path, here: Path, holdfast: Cli
) -> None:
    words = passed_before(made, holdfast)
    done = holdfast(*words, *extra)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert said in line
    assert nothing_left()


def test_the_same_weights_are_said(made: Path, here: Path, holdfast: Cli) -> None:
    words = passed_before(made, holdfast)
    words[2] = words[1]
    done = holdfast(*words)
    assert (done.code, nothing_left()) == (2, True)
    assert "are the same weights" in done.err


def test_refused_before_a_weight_is_loaded(
    made: Path, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(releasing, "load_pair", never)
    for margins in ({"gsm8k": "3pt"}, {"words": "1pt"}, {"words": "-1pt"}):
        file = gate_file(made, margins=margins)
        assert holdfast("gate", "base", "tuned", "--gate", file).code == 2
    overlapping = gate_file(made, selection=str(made / "words.jsonl"))
    assert holdfast("gate", "base", "tuned", "--gate", overlapping).code == 2


def test_a_verdict_of_someone_elses_is_not_overwritten(
    made: Path, here: Path, holdfast: Cli
) -> None:
    Path("verdict.json").write_text('{"verdict": "mine"}')
    done = holdfast("gate", str(made / "base"), str(made / "near"), "--gate", gate_file(made))
    assert done.code == 2
    assert "is not overwritten" in done.err
    assert left() == {"verdict": "mine"}


def test_where_nothing_may_be_written_nothing_is_read(
    made: Path, here: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    models = [str(made / "base"), str(made / "near"), "--canary", str(made / "prose.jsonl")]
    for words in (["gate", *models], ["compare", *models, "--out", "c"]):
        done = holdfast(*words)
        assert done.code == 2
        assert "may not be written; name another" in done.err


@pytest.mark.parametrize("option", ["--markdown", "--junit"])
def test_a_page_of_someone_elses_is_not_taken_away(
    made: Path, here: Path, holdfast: Cli, option: str
) -> None:
    Path("NOTES.md").write_text("# Notes\n")
    words = [str(made / "base"), str(made / "near"), "--gate", gate_file(made), option, "NOTES.md"]
    done = holdfast("gate", *words)
    assert done.code == 2
    assert "'NOTES.md' was not written by `holdfast gate`" in done.err
    assert Path("NOTES.md").read_text() == "# Notes\n"


# --- selection and sealed ------------------------------------------------------------------------


def test_items_that_something_was_chosen_by_are_refused_by_id(
    made: Path, here: Path, holdfast: Cli
) -> None:
    rows = [json.loads(line) for line in (made / "words.jsonl").read_text().splitlines()]
    tiny.jsonl(here / "dev.jsonl", [{**rows[7], "id": "seven", "probe": "dev"}, rows[9]])
    file = gate_file(made, selection="dev.jsonl")
    done = holdfast("gate", str(made / "base"), str(made / "near"), "--gate", file)
    assert (done.code, nothing_left()) == (2, True)
    assert "2 items of the sealed split" in done.err
    assert "words/7 (= dev/seven), words/9" in done.err


def test_of_a_rewound_model_only_the_sealed_half_is_judged(
    made: Path, here: Path, holdfast: Cli
) -> None:
    words = ["rewind", str(made / "base"), str(made / "near"), "--out", "rewound"]
    words += ["--probes", str(made / "words.jsonl"), "--probes", str(made / "sums.jsonl"),
              "--margin", "words=20pt", "--margin", "sums=50%"]  # fmt: skip
    assert holdfast(*words, "--canary", str(made / "prose.jsonl")).code in (0, 3, 4)
    words = ["gate", str(made / "base"), "rewound/model", "--gate"]
    assert holdfast(*words, gate_file(made)).code == 0
    halved = {row["name"]: row["n"] for row in left()["rows"]}
    assert left()["items"] == "sealed half"
    assert 60 < halved["words"] < 140
    done = holdfast(*words, gate_file(made, items="all"))
    assert (done.code, nothing_left()) == (2, True)
    assert f"{200 - halved['words'] + 40 - halved['sums']} items of the sealed split" in done.err


# --- a run alone ---------------------------------------------------------------------------------


def test_a_run_is_judged_by_the_readings_it_ended_with(
    finished_run: Path, here: Path, holdfast: Cli
) -> None:
    done = holdfast("gate", str(finished_run), "--margin", "canary=90%")
    assert done.code == left()["exit_code"]
    (row,) = [row for row in left()["rows"] if row["name"] == "base samples"]
    assert row["margin_text"] == "90%"
    items = [json.loads(x) for x in (finished_run / "items.jsonl").read_text().splitlines()]
    sealed = [i for i in items if i["split"] == "sealed" and i["meter"] == "canary"]
    rise = sum(i["after"] - i["before"] for i in sealed) / len(sealed)
    assert row["difference"] == pytest.approx(rise)


@pytest.fixture
def run(finished_run: Path, here: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(finished_run, here / "run")
    return here / "run"


def edited(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_what_a_run_failed_by_without_items_stands(run: Path, holdfast: Cli) -> None:
    """An alarm that ended it, and a domain that was not read after: no margin mends that."""
    record = json.loads((run / "verdict.json").read_text())
    alarm = {"name": "canary/prose", "meter": "alarm", "kind": "guardrail", "n": 0}
    failed = {"decisive": True, "verdict": "FAIL", "reason": "has risen"}
    gone = alarm | {"name": "base samples", "meter": "canary", "kind": "canary"}
    for row in (alarm, gone):
        record["rows"] = [row | failed]
        (run / "verdict.json").write_text(json.dumps(record))
        done = holdfast("gate", str(run), "--margin", "canary=90%")
        assert (done.code, left()["verdict"]) == (3, "FAIL")
        rows = [one for one in left()["rows"] if one["name"] == row["name"]]
        assert [one["reason"] for one in rows] == ["has risen"]


def other_weights(run: Path) -> None:
    file = next(run.glob("*/*.safetensors"))
    weights = load_file(file)
    weights[next(iter(weights))] += 1
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: edited(run / "items.jsonl", '"after": ', '"after": 1'), "of another run"),
        (lambda run: edited(run / "readings.jsonl", '"n": ', '"n": 1'), "of another run"),
        (other_weights, "of another run"),
        (lambda run: (run / "items.jsonl").unlink(), "of another run"),
        (lambda run: (run / "verdict.json").unlink(), "has not ended"),
        (lambda run: edited(run / "verdict.json", '"sha256"', '"md5"'), "has not ended"),
        (lambda run: edited(run / "recipe.yaml", "probes: []", "probes: [a.jsonl]"), "a.jsonl"),
    ],
)
def test_readings_of_another_run_are_refused(
    change: Callable[[Path], None], said: str, run: Path, holdfast: Cli
) -> None:
    change(run)
    done = holdfast("gate", str(run))
    assert (done.code, done.out, nothing_left()) == (2, "", True)
    (line,) = done.err.splitlines()
    assert said in line


def test_a_run_alone_reads_nothing_else(run: Path, holdfast: Cli, made: Path) -> None:
    done = holdfast("gate", str(run), "--canary", str(made / "prose.jsonl"))
    assert done.code == 2
    assert "holdfast gate BASE" in done.err
    Path("g.yaml").write_text("margins: {canary: 90%}\nprobes: [x.jsonl]\n")
    done = holdfast("gate", str(run), "--gate", "g.yaml")
    assert done.code == 2
    assert "g.yaml: probes: a run alone" in done.err


def test_in_its_own_folder_a_run_keeps_its_verdict(
    run: Path, holdfast: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    then = Path("verdict.json").read_text()
    done = holdfast("gate", ".")
    assert (done.code, Path("verdict.json").read_text()) == (2, then)
    assert holdfast("gate", ".", "--out", "release.json", "--margin", "canary=90%").code in (
        0,
        3,
        4,
    )


def test_base_and_run_take_the_margins_of_the_run(
    finished_run: Path, tiny_model: Path, here: Path, holdfast: Cli
) -> None:
    done = holdfast("gate", str(tiny_model), str(finished_run))
    assert done.code in (0, 3, 4)
    assert {row["name"] for row in left()["rows"]} == {"base samples"}
