"""What is read of a model: which texts, which splits, and what is refused."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from holdfast.data.example import Example, Role
from holdfast.data.rows import Source
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.measure import (
    WINDOWS,
    Measure,
    _fitting,
    context_length,
    lesson_documents,
    require_finite,
    shared_documents,
    text_documents,
)
from holdfast.meters import Reading
from holdfast.meters.canary import Canary, Document, document
from holdfast.meters.drift import Start
from holdfast.meters.probes import Item
from holdfast.meters.recovery import recovery_examples

TEXTS = [{"text": f"it was day {n} and the cat sat on the mat."} for n in range(12)]
ITEMS = [Item(id=f"{n}", probe="sums", kind="nll", prompt="1 +", target=f" {n}.") for n in range(8)]


def canary_of(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Canary:
    file = tiny.jsonl(folder / "text.jsonl", rows)
    return Canary(sources=[Source(path=str(file))], **more)


class Pairs:
    """A tokenizer of two letters a token: the count is all that is asked of it."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * math.ceil(len(text) / 2)}


@settings(max_examples=40)
@given(st.text(alphabet=tiny.LETTERS, max_size=60), st.integers(1, 30))
def test_a_text_is_cut_where_both_tokenizers_still_have_room(text: str, most: int) -> None:
    """A letter a token is the stricter of the two, so the longest beginning is known."""
    assert _fitting(text, (tiny.letters(), Pairs()), most) == text[:most]
    assert _fitting(text, (Pairs(), Pairs()), most) == text[: 2 * most]


@settings(max_examples=15)
@given(st.lists(st.text(alphabet="abc .", min_size=1, max_size=90), min_size=1, max_size=4))
def test_shared_documents_are_the_same_text(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"text": f"x{text}"} for text in texts]
        tokenizer = tiny.letters()
        one, other = shared_documents(canary_of(Path(folder), rows), (tokenizer, tokenizer), 16)
    assert [d.id for d in one] == [d.id for d in other]
    whole: dict[str, str] = {}
    for d in one:
        text = tokenizer.decode(d.text.input_ids, skip_special_tokens=True)
        whole[d.cluster] = whole.get(d.cluster, "") + text
    wanted = dict.fromkeys(row["text"][: WINDOWS * 14] for row in rows)
    assert list(whole.values()) == list(wanted)


def test_chat_rows_are_refused_across_tokenizers(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(RequestError, match=r"text\.jsonl line 1: a chat row"):
        shared_documents(canary_of(tmp_path, rows), (tiny.letters(), tiny.letters()), 16)


def test_a_domain_has_so_many_documents_and_none_twice(tmp_path: Path) -> None:
    found = text_documents(canary_of(tmp_path, TEXTS * 2, max_documents=8), tiny.letters(), 64)
    assert len(found) == len({d.id for d in found}) == 8


def test_while_training_nothing_is_read_that_a_gate_reads(tmp_path: Path) -> None:
    documents = text_documents(canary_of(tmp_path, TEXTS), tiny.letters(), 64)
    measure = Measure(tiny.letters(), documents, ITEMS, documents, choosing=True)
    model = tiny.tiny("Llama")
    while_training = measure.glance(model, 1, lesson=True)
    assert {(r.meter, r.split) for r in while_training} == {
        ("canary", "selection"), ("lesson", "selection"), ("probe", "selection")
    }  # fmt: skip
    looked_at = {(r.meter, r.name, i) for r in while_training for i in r.items}
    sealed = [r for r in measure.whole(model, 1) if r.split == "sealed"]
    judged = {(r.meter, r.name, i) for r in sealed for i in r.items}
    assert looked_at
    assert not looked_at & judged
    assert {("probe", i.probe, i.id) for i in ITEMS} <= looked_at | judged
    measure = replace(measure, choosing=False)
    assert {(r.meter, r.split) for r in measure.glance(model, 1)} == {("canary", "selection")}
    (all_items,) = [r for r in measure.whole(model, 0) if r.meter == "probe"]
    assert (all_items.split, all_items.n) == ("sealed", len(ITEMS))
    whole = measure.whole(model, 0)
    assert {("canary", "sealed"), ("lesson", "sealed"), ("probe", "sealed")} <= {
        (r.meter, r.split) for r in whole
    }
    assert measure.routed(model) is None


def test_the_split_is_by_what_a_row_says_not_by_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, another folder or another order must not move text between the halves."""
    rows = [{**row, "domain": "d"} for row in TEXTS]
    (tmp_path / "elsewhere").mkdir()
    moved = canary_of(tmp_path / "elsewhere", rows[::-1])
    monkeypatch.chdir(tmp_path)
    canary_of(tmp_path, rows)
    here = Canary(sources=[Source(path="text.jsonl")])
    one, other = (
        {d.id: d.split for d in text_documents(canary, tiny.letters(), 64)}
        for canary in (here, moved)
    )
    assert one == other
    assert set(one.values()) == {"selection", "sealed"}


def test_the_context_is_the_smaller_of_model_and_tokenizer() -> None:
    model, tokenizer = tiny.tiny("Llama"), tiny.letters()
    assert context_length(model.config, tokenizer) == 64
    tokenizer.model_max_length = 20
    assert context_length(model.config, tokenizer) == 20


def test_a_reading_that_is_no_number_is_refused() -> None:
    sound = Reading("canary", "web", "sealed", 0, 1.0, 0.1, 1, "nats", items={"a": 1.0})
    require_finite([sound], "MODEL 'x'")
    for value in (math.nan, math.inf):
        broken = Reading("canary", "web", "sealed", 0, 1.0, 0.1, 1, "nats", items={"a": value})
        with pytest.raises(RequestError, match=r"^MODEL 'x': its logits .* canary 'web'"):
            require_finite([sound, broken], "MODEL 'x'")


# ---- what the lesson asks for


def taught(answers: dict[str, str]) -> list[Document]:
    """The rows of a lesson as it is trained on: prompt and answer."""
    tokenizer, rows = tiny.letters(), []
    for prompt, answer in answers.items():
        before, after = (
            [tiny.BOS, *tokenizer(prompt)["input_ids"]],
            tokenizer(answer)["input_ids"],
        )
        mask = [False] * len(before) + [True] * (len(after) + 1)
        rows.append(Example([*before, *after, tiny.EOS], mask))
    return lesson_documents([Stream.of("task", Role.TASK, 1.0, rows)])


def written(model: Any, prompt: str) -> str:
    """What transformers itself writes, eight letters."""
    ids = torch.tensor([[tiny.BOS, *tiny.letters()(prompt)["input_ids"]]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
        pad_token_id=tiny.PAD,
    )  # fmt: skip
    text: str = tiny.letters().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text.split("\n")[0].strip()


def test_answers_in_the_lessons_form_are_counted_where_it_does_not_apply() -> None:
    model = tiny.tiny("Llama")
    answers = {prompt: written(model, prompt) for prompt in "abcdefgh"}
    form = next(answer[:3] for answer in answers.values() if len(answer) > 3)
    items = [
        Item(id=p, probe="near", kind="exact", prompt=p, target="x", max_new_tokens=8,
             tags=["adoption"]) for p in answers
    ]  # fmt: skip
    lesson = taught({f"{n}?": f"{form}{n} is {n}" for n in range(12)})
    measure = Measure(tiny.letters(), (), items, rows=lesson)
    found = {r.meter: r.value for r in measure.whole(model, 0)}
    share = sum(answer.startswith(form) for answer in answers.values()) / len(answers)
    assert share > 0
    assert (found["over_application"], found["adoption"]) == (share, 1 - share)
    assert measure.notes == {}
    while_training = replace(measure, choosing=True).glance(model, 1)
    assert ("over_application", "selection") in {(r.meter, r.split) for r in while_training}


def test_a_lesson_without_a_form_is_noted_and_not_read() -> None:
    item = Item(id="1", probe="near", kind="exact", prompt="a", target="x", tags=["adoption"])
    lesson = taught({f"{n}?": f"{chr(97 + n)} is {n}" for n in range(12)})
    measure = Measure(tiny.letters(), (), [item], rows=lesson)
    assert {r.meter for r in measure.whole(tiny.tiny("Llama"), 0)} == {"probe"}
    why = "the lesson's responses share no beginning, end or syntax to know it by"
    assert measure.notes == {"over_application": f"not read: {why}"}


def afterwards(measure: Measure, model: Any, **more: Any) -> tuple[dict[str, float], list[str]]:
    """Values by name, and the warnings."""
    given = {"before": [], "after": [], "routed": None, "start": Start(model)} | more
    readings, warnings = measure.afterwards(model, step=4, **given)
    return {f"{r.meter} {r.name}": r.value for r in readings}, warnings


def test_a_classifier_that_says_one_label_is_found_out() -> None:
    """Without its last norm every label is equally likely, so the lesson's first one is taken."""
    model: Any = tiny.tiny("Llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    answers = {f"{n}?": "no" if n % 3 else "ja" for n in range(60)}
    rows = taught(answers)
    measure = Measure(tiny.letters(), rows=rows[:40], heldout=rows[40:])
    found, warnings = afterwards(measure, model)
    sealed = [tiny.letters().decode(d.text.input_ids) for d in rows[40:] if d.split == "sealed"]
    truth = sum("no" in text for text in sealed) / len(sealed)
    assert 0 < truth < 1
    assert found["collapse majority_share"] == 1
    assert found["collapse excess"] == pytest.approx(1 - truth)
    assert warnings == []
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    assert afterwards(measure, model) == ({}, [])
    assert measure.notes["collapse"].startswith("not read: the model's logits are not numbers")
    free = taught({f"{n}?": f"{n}" for n in range(60)})
    assert afterwards(Measure(tiny.letters(), rows=free[:40], heldout=free[40:]), model)[0] == {}


def test_items_that_fell_are_asked_again_after_practice() -> None:
    """What practice brings back is the meter's own test; here, who is asked, and of what model."""
    model, tokenizer = tiny.tiny("Llama"), tiny.letters()
    items = [Item(id=p, probe="old", kind="exact", prompt=p, target="q.") for p in "ab"]
    examples = [
        Item(id=p, probe="old", kind="exact", prompt=p, target="q.", tags=["recovery"])
        for p in "cd"
    ]
    practice = recovery_examples(examples, tokenizer, model.config)
    assert len(practice) == 2
    measure = Measure(tokenizer, (), [*items, *examples], practice=practice)
    after = measure.whole(model, 4)
    (now,) = (r for r in after if r.meter == "probe")
    assert now.items == {"a": 0.0, "b": 0.0}
    right = Reading("probe", "old", "sealed", 0, 0.5, 0.5, 2, "accuracy",
                    items={"a": 1.0, "b": 0.0})  # fmt: skip
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (before, again, gain) = measure.recovered(model, [right], after, 4)
    assert [r.name for r in (before, again, gain)] == ["old/before", "old/after", "old/gain"]
    assert before.items == {"a": 0.0}  # the other was never right
    assert gain.value == again.value - before.value
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert measure.recovered(model, [now], after, 4) == []
    unpractised = Measure(tokenizer, (), [*items, *examples])
    assert unpractised.recovered(model, [right], after, 4) == []


def test_an_expert_of_the_lesson_that_nothing_watches_is_warned_of() -> None:
    """Expert 3 of the first layer is for the letter z: it alone points along the first axis."""
    model: Any = tiny.tiny("Mixtral", num_experts_per_tok=1)
    first, z = model.model.layers[0], tiny.LETTERS.index("z")
    with torch.no_grad():
        first.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = -1.0
        model.model.embed_tokens.weight[z, 0] = 1.0
        first.mlp.gate.weight.zero_()
        first.mlp.gate.weight[3, 0] = 9.0
    start = Start(model)
    lesson = taught({"z" * n: "z" * 9 for n in range(1, 12)})
    texts = [document(tiny.letters()(row["text"])["input_ids"], [True] * len(row["text"]), "web")
             for row in TEXTS]  # fmt: skip
    reach = Item(id="1", probe="zs", kind="nll", prompt="z" * 50, target="z")
    given: Any = {"rows": lesson, "canary": texts}
    measure = Measure(tiny.letters(), **given)
    routed = measure.routed(model)
    assert routed is not None
    assert afterwards(measure, model, start=start, routed=routed)[1] == []  # nothing was moved
    with torch.no_grad():
        first.mlp.experts.down_proj[3] += 1.0
    found, (told,) = afterwards(measure, model, start=start, routed=routed)
    assert "overwrites few experts of 'model.layers.0.mlp'" in told
    assert found["expert_load model.layers.0.mlp/3"] > 0.5
    reached = Measure(tiny.letters(), items=[reach] * 9, **given)
    assert afterwards(reached, model, start=start, routed=routed)[1] == []
