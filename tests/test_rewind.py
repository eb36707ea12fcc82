"""Rewind: the search, the ways between two models, and what is written of them.

Expected numbers: the search against a plain scan of every position; interpolated weights by
float64 arithmetic; a scaled adapter against peft's own scaling.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from holdfast.between import FINEST, between, block_of
from holdfast.cli import rewind as rewind_command
from holdfast.data.rows import Source
from holdfast.errors import RequestError
from holdfast.gate.margins import Gate
from holdfast.meters import Reading
from holdfast.meters.canary import Canary
from holdfast.pair import Texts
from holdfast.points import Point, furthest, judged, recovered
from holdfast.report.frontier import Mark, frontier
from holdfast.rewind import rewind

Cli = Callable[..., Any]
PROSE = [{"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(24)]
ITEMS = [
    {"id": f"{n}", "probe": "sums", "kind": "nll", "prompt": f"{n} + 1 =", "target": f" {n + 1}."}
    for n in range(12)
]
LORA = LoraConfig(
    r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a whole model, adapters and checkpoints that were made of it."""
    folder = tmp_path_factory.mktemp("made")
    base, tokenizer = tiny.tiny("Llama"), tiny.letters()
    tiny.save(folder / "base", base, tokenizer)
    tuned = tiny.tiny("Llama")
    tiny.moved(tuned, spread=0.08)
    tiny.save(folder / "tuned", tuned, tokenizer)
    for name, config in (("lora", LORA), ("dora", LoraConfig(r=2, use_dora=True, target_modules=[
            "q_proj"], task_type="CAUSAL_LM"))):  # fmt: skip
        loaded = AutoModelForCausalLM.from_pretrained(folder / "base")
        adapted = get_peft_model(loaded, config)
        tiny.moved(adapted, spread=0.25)
        adapted.save_pretrained(folder / name)
    for step, spread in ((10, 0.01), (20, 0.3)):
        saved = tiny.tiny("Llama")
        tiny.moved(saved, spread=spread, seed=step)
        tiny.save(folder / "trained" / f"checkpoint-{step}", saved, tokenizer)
        (folder / "trained" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"state")
    tiny.save(folder / "trained" / "checkpoint-30", tuned, tokenizer)
    tiny.jsonl(folder / "prose.jsonl", PROSE)
    tiny.jsonl(folder / "items.jsonl", ITEMS)
    return folder


def texts(made: Path, probes: bool = False) -> Texts:
    canary = Canary(sources=[Source(path=str(made / "prose.jsonl"))])
    return Texts(canary, [str(made / "items.jsonl")] if probes else [])


def found_in(made: Path, tuned: str, canary: str, **more: Any) -> Any:
    gate = Gate(margins={"canary": canary})
    return rewind(str(made / "base"), str(made / tuned), texts(made), gate=gate, **more)


@given(st.integers(1, 70), st.integers(1, 20), st.data())
@settings(max_examples=80, deadline=None)
def test_a_monotone_way_is_searched_exactly(last: int, every: int, data: st.DataObject) -> None:
    edge = data.draw(st.integers(0, last))
    asked: list[int] = []

    def kept(position: int) -> bool:
        asked.append(position)
        return position <= edge

    assert furthest(last, every, kept, lambda: False) == (edge, True)
    assert len(asked) == len(set(asked)) <= last // every + 1 + every.bit_length()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 9), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_way_ends_at_a_point_that_was_kept(
    answers: list[bool], every: int, recovers: bool
) -> None:
    whole = [True, *answers]
    last = len(answers)
    position, straight = furthest(last, every, whole.__getitem__, lambda: recovers)
    assert whole[position]
    grid = sorted({*range(0, last + 1, every), last})
    below = [p for p in grid if all(whole[q] for q in grid if q <= p)]
    if not straight:
        assert position == below[-1]
    seen = [whole[p] for p in grid]
    assert straight == (not recovers and seen == sorted(seen, reverse=True))


@given(st.floats(0, 1), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_between_is_the_interpolation(share: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    then, now = torch.randn(2, 5, generator=random)
    exact = then.double() + share * (now.double() - then.double())
    assert torch.allclose(between(then, now, share).double(), exact, atol=1e-6)
    assert torch.equal(between(then, now, 1.0), now)
    assert torch.equal(between(then, now, 0.0), then)


def test_weights_are_written_as_they_were_measured(made: Path, tmp_path: Path) -> None:
    found = found_in(made, "tuned", "3%", out=tmp_path / "out")
    assert 0 < found.chosen.position < FINEST
    assert found.artifact == tmp_path / "out" / "model"
    share = found.chosen.position / FINEST
    base, tuned, ours = (
        load_file(folder / "model.safetensors")
        for folder in (made / "base", made / "tuned", found.artifact)
    )
    for name, tensor in ours.items():
        exact = base[name].double() + share * (tuned[name].double() - base[name].double())
        assert torch.allclose(tensor.double(), exact, atol=1e-6)
    # one step of 1/64 further is beyond the margin, and was read
    further = next(p for p in found.points if p.position == found.chosen.position + 1)
    assert found.chosen.worst <= 1 < further.worst
    assert not further.kept
    marks = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert [m["name"] for m in marks if m["chosen"]] == [found.chosen.name]
    assert 'data-figure="frontier"' in (tmp_path / "out" / "report.html").read_text()
    again = found_in(made, "tuned", "3%")  # nothing is random
    assert again.chosen.position == found.chosen.position


def test_an_adapter_is_scaled_as_peft_would(made: Path, tmp_path: Path) -> None:
    found = found_in(made, "lora", "5%", out=tmp_path / "out")
    share = found.chosen.position / FINEST
    assert 0 < share < 1
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    written = PeftModel.from_pretrained(base, found.artifact).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = written(input_ids=ids).logits
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made / "base"), made / "lora"
    ).eval()
    start = load_file(made / "base" / "model.safetensors")["lm_head.weight"]
    for module in whole.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(share)
        if isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save["default"].weight
            head.data = start + share * (head.data - start)
    with torch.no_grad():
        theirs = whole(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_an_adapter_that_is_not_linear_becomes_a_model(made: Path, tmp_path: Path) -> None:
    found = found_in(made, "dora", "0.5%", out=tmp_path / "out")
    assert found.artifact.name == "model"
    assert "DoRA" in found.notes[0]
    with pytest.raises(RequestError, match=r"--path adapter: a DoRA.*give --path weights"):
        found_in(made, "dora", "1%", path="adapter")


def test_blocks_go_back_whole(made: Path, tmp_path: Path) -> None:
    found = found_in(made, "lora", "8%", path="blocks", out=tmp_path / "out")
    assert found.points[-1].name == "3 of 3 blocks"  # two layers, and the head
    assert found.artifact.name == "adapter"
    assert 0 < found.chosen.position < 3
    ours = load_file(found.artifact / "adapter_model.safetensors")
    theirs = load_file(made / "lora" / "adapter_model.safetensors")
    head = load_file(made / "base" / "model.safetensors")["lm_head.weight"]
    kept = set()
    for key, tensor in ours.items():
        block = block_of(key.removeprefix("base_model.model."))
        if torch.equal(tensor, theirs[key]):
            kept |= {block} if "lora_A" not in key else set()
        else:
            assert torch.equal(tensor, head if "lm_head" in key else torch.zeros_like(tensor))
    assert len(kept) == found.chosen.position


def test_back_along_checkpoints(made: Path, tmp_path: Path) -> None:
    found = found_in(made, "trained/checkpoint-30", "1%", path="checkpoints", out=tmp_path / "out")
    assert [p.name for p in found.points] == ["base", "checkpoint-10", "checkpoint-20", "tuned"]
    assert found.chosen.name == "checkpoint-10"
    written = sorted(file.name for file in found.artifact.iterdir())
    assert "model.safetensors" in written
    assert "optimizer.pt" not in written
    ours = load_file(found.artifact / "model.safetensors")
    theirs = load_file(made / "trained" / "checkpoint-10" / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with pytest.raises(RequestError, match="has no checkpoints"):
        found_in(made, "tuned", "1%", path="checkpoints")


def test_a_way_that_comes_back_is_not_refined(made: Path) -> None:
    """checkpoint-20 is beyond the margin, and what came after it is within."""
    found = found_in(made, "trained/checkpoint-30", "6%", path="checkpoints")
    assert any("recovers along the way" in note for note in found.notes)
    assert any("not monotone" in note for note in found.notes)
    assert found.chosen.name == "checkpoint-10"


def reading(value: float, step: int, items: int = 8) -> Reading:
    values = {str(i): value + 0.01 * i for i in range(items)}
    mean = sum(values.values()) / items
    return Reading("canary", "prose", "selection", step, mean, 0.0, items, "nats",
                   tags=("canary",), items=values)  # fmt: skip


def point(value: float, rule: Any = "estimate", **margins: str) -> Point:
    gate = Gate(margins=margins or {"canary": "10%"})
    return judged(1, "1", [reading(1.0, 0)], [reading(value, 1)], gate, rule)


def test_a_point_is_judged_by_its_worst_guardrail() -> None:
    """Base mean 1.035, margin 10 %: a rise of 0.05 is 0.483 margins; by hand."""
    one = point(1.05)
    assert one.kept
    assert one.worst == pytest.approx(0.05 / 0.1035)
    assert not point(1.2).kept
    broken = point(float("nan"))
    assert not broken.kept
    assert broken.worst == float("inf")


def test_a_mark_is_plain_json() -> None:
    mark = Mark("1", 0.5, None, float("inf"), "canary/prose", kept=False, chosen=False)
    assert json.loads(json.dumps(mark.as_record(), allow_nan=False))["worst"] is None
    assert mark.cells() == ("1", "50.0%", "—", "canary/prose", "+inf", "beyond margin")
    assert frontier([mark]) is not None
    assert frontier([]) is None


def test_the_checkpoints_of_the_run_are_drawn_beside_the_points_of_its_rewind() -> None:
    ends = [
        Mark("base", 0.0, 0.0, 0.0, "", True, False),
        Mark("100%", 1.0, 1.0, 3.0, "a", False, True),
    ]
    run = [
        Mark("base", 0.0, 0.0, 0.0, "", True, False),
        Mark("step 5", 0.5, 0.8, 2.0, "b", False, False),
    ]
    figure = frontier(ends, run)
    assert figure is not None
    (beside,) = [
        trace for trace in figure.spec["data"] if trace["name"] == "checkpoints of the run"
    ]
    assert (beside["x"], beside["y"]) == ([0.0, 80.0], [0.0, 2.0])
    alone = frontier(ends)
    assert alone is not None
    assert "checkpoints of the run" not in [trace["name"] for trace in alone.spec["data"]]


def test_a_canary_and_a_probe_may_share_a_name() -> None:
    """The canary rose by 2 margins; the probe of its name, read after it, did not move."""
    same = [Reading("probe", "prose", "train", step, 1.0, 0.0, 8, "accuracy", items={
        str(i): 1.0 for i in range(8)}) for step in (0, 1)]  # fmt: skip
    before, after = [reading(1.0, 0), same[0]], [reading(1.207, 1), same[1]]
    found = judged(1, "1", before, after, Gate(margins={"canary": "10%"}), "estimate")
    assert (found.kept, found.culprit) == (False, "canary/prose")
    assert found.worst == pytest.approx(2.0)


def test_recovery_must_be_shown() -> None:
    up, down = point(1.3), point(1.1)
    assert recovered([point(1.0), up, down], 0.05) == ["canary/prose"]
    assert recovered([point(1.0), down, up], 0.05) == []
    # getting better than the base is no recovery
    assert recovered([point(1.0), point(0.9), point(0.8)], 0.05) == []


def test_what_cannot_be_rewound_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "copy")
    with pytest.raises(RequestError, match="are the same weights"):
        rewind(str(made / "base"), str(tmp_path / "copy"), texts(made))
    with pytest.raises(RequestError, match="TUNED is no adapter on BASE; give --path weights"):
        found_in(made, "tuned", "1%", path="adapter")
    tiny.jsonl(tmp_path / "one.jsonl", ITEMS[:1])
    few = Texts(texts(made).canary, [str(tmp_path / "one.jsonl")])
    with pytest.raises(RequestError, match=r"'sums' has no item in the \w+ split"):
        rewind(str(made / "base"), str(made / "tuned"), few)
    with pytest.raises(RequestError, match="the recipe sets a margin of 2pt, but nothing"):
        rewind(str(made / "base"), str(made / "tuned"), texts(made), gate=Gate(
            margins={"mmlu": "2pt"}))  # fmt: skip
    answers = [
        {"id": f"{n}", "probe": "pick", "kind": "choice", "prompt": "a", "choices": ["b", "c"],
         "answer": n % 2} for n in range(20)
    ]  # fmt: skip
    file = tiny.jsonl(tmp_path / "choices.jsonl", answers)
    with pytest.raises(RequestError, match="--rule shown: pick: of so few items"):
        rewind(
            str(made / "base"), str(made / "tuned"), Texts(texts(made).canary, [str(file)]),
            rule="shown",
        )  # fmt: skip


def test_margins_of_the_command_line_go_over_those_of_the_run(
    finished_run: Path, here: Path
) -> None:
    shutil.copytree(finished_run, here / "run")
    written = yaml.safe_load((here / "run" / "recipe.yaml").read_text())
    written["gate"] |= {"alpha": 0.01, "margins": {"canary": "2%", "sums": "3pt"}}
    (here / "run" / "recipe.yaml").write_text(yaml.safe_dump(written))
    gate = rewind_command._gate(["sums=5pt"], "run")
    assert gate is not None
    assert (gate.alpha, gate.margins) == (0.01, {"canary": "2%", "sums": "5pt"})
    assert rewind_command._gate(None, "run") is None


def test_the_command_shows_the_frontier(made: Path, tmp_path: Path, holdfast: Cli) -> None:
    given_files = ["--canary", str(made / "prose.jsonl"), "--probes", str(made / "items.jsonl")]
    where = [str(made / "base"), str(made / "tuned")]
    result = holdfast("rewind", *where, *given_files, "--margin", "canary=3%", "--json")
    record = json.loads(result.out)
    assert result.code in (0, 3, 4)
    assert record["verdict"]["exit_code"] == result.code
    assert sum(mark["chosen"] for mark in record["frontier"]) == 1
    for words, said in (
        (["--margin", "canary"], "is not NAME=AMOUNT"),
        (["--margin", "canary=-1%"], "has the wrong sign"),
        (["--path", "scale"], "--path: 'scale' is none"),
        (["--rule", "sure"], "--rule: 'sure' is none"),
    ):
        refused = holdfast("rewind", *where, *given_files, *words)
        assert refused.code == 2
        assert said in refused.err


def test_nothing_is_left_where_every_step_is_too_far(made: Path, tmp_path: Path) -> None:
    """The first checkpoint is beyond a margin of 0.1 % already."""
    where = "trained/checkpoint-30"
    found = found_in(made, where, "0.1%", path="checkpoints", out=tmp_path / "out")
    assert found.chosen.position == 0
    assert (found.verdict, found.artifact) == (None, None)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_run_brings_its_own_texts(finished_run: Path, tiny_model: Path) -> None:
    """The run's canary was sampled from the base, as the rewind's is."""
    found = rewind(str(tiny_model), str(finished_run))
    assert found.summary["path"] in ("adapter", "weights")
    assert found.chosen.rows[0].name == "base samples"
