"""Probes on hand-made items, against answers read off the model's logits one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from holdfast.errors import RequestError
from holdfast.meters import HALVES, half_of
from holdfast.meters.probes import Item, Results, load_items, read_probes, require_both_halves

MODEL = tiny.tiny("Llama")
TOKENIZER = tiny.letters(tiny.CHAT)


def ids(text: str) -> list[int]:
    return [(tiny.LETTERS + "\0").index(letter) for letter in text]


def logp(prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
    """Log-likelihood of each token of the continuation, in float64."""
    with torch.no_grad():
        logits = MODEL(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(rows, continuation, strict=True)]


def greedy(prompt: Sequence[int], length: int) -> str:
    """The likeliest letter, one by one."""
    found = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            found.append(int(MODEL(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return "".join(tiny.LETTERS[i] for i in found[len(prompt) :])


def reading(items: list[Item]) -> Any:
    (one,) = read_probes(MODEL, TOKENIZER, items, 7)
    assert (one.meter, one.split, one.step, one.n) == ("probe", "sealed", 7, len(items))
    return one


def test_exact_is_the_greedy_answer_up_to_a_stop_string() -> None:
    prompts = ["cat", "abc", "the", "dog"]
    answers = [greedy([tiny.BOS, *ids(prompt)], 4) for prompt in prompts]
    stop = answers[3][2]
    targets = [f" {answers[0]}\n", answers[1], answers[2][:3], answers[3][:2]]
    right = [1.0, 1.0, 0.0, 1.0]
    assert stop not in answers[3][:2]
    items = [
        Item(
            id=prompt,
            probe="sums",
            kind="exact",
            prompt=prompt,
            target=target,
            stop=[stop] if prompt == "dog" else [],
            max_new_tokens=4,
        )
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    one = reading(items)
    assert one.items == dict(zip(prompts, right, strict=True))
    assert (one.value, one.unit) == (0.75, "accuracy")


def test_choice_is_the_likeliest_continuation_by_the_token() -> None:
    """By the mean: the sum would favour short choices, and here it decides otherwise."""
    prompts, choices = ["ab", "cd", "ef", "gh"], [" a", " bcd", " efgh", "xyz12"]
    means, sums, items = [], [], []
    for prompt in prompts:
        scores = [logp([tiny.BOS, *ids(prompt)], ids(choice)) for choice in choices]
        means.append(max(range(4), key=lambda i: sum(scores[i]) / len(scores[i])))
        sums.append(max(range(4), key=lambda i: sum(scores[i])))
        item = Item(
            id=prompt, probe="facts", kind="choice", prompt=prompt, choices=choices, answer=means[0]
        )
        items.append(item)
    assert means != sums
    assert len(set(means)) > 1
    one = reading(items)
    assert list(one.items.values()) == [float(best == means[0]) for best in means]
    assert one.unit == "accuracy"


def test_nll_is_nats_a_token_of_the_target_alone() -> None:
    rows = {"ab": " cde", "": "x", "abcdef": "z ="}
    items = [
        Item(id=prompt, probe="style", kind="nll", prompt=prompt, target=target)
        for prompt, target in rows.items()
    ]
    one = reading(items)
    expected = {
        prompt: -sum(logp([tiny.BOS, *ids(prompt)], ids(target))) / len(target)
        for prompt, target in rows.items()
    }
    assert one.items == pytest.approx(expected, rel=1e-5)
    assert one.value == pytest.approx(sum(expected.values()) / 3)
    spread = sum((value - one.value) ** 2 for value in one.items.values()) / 2
    assert one.stderr == pytest.approx(math.sqrt(spread / 3))
    assert one.unit == "nats"


def test_a_chat_is_asked_through_the_template() -> None:
    prompt = [tiny.USER, *ids("hi"), tiny.BOT]
    answer = greedy(prompt, 3)
    chat = [{"role": "user", "content": "hi"}]
    item = Item(id="1", probe="chat", kind="exact", prompt=chat, target=answer, max_new_tokens=3)
    assert reading([item.model_copy(update={"stop": []})]).value == 1.0
    with pytest.raises(RequestError, match=r"item '1' of 'chat' is a chat.*no chat template"):
        read_probes(MODEL, tiny.letters(), [item], 0)


def test_a_reading_a_probe_with_tags_and_clusters() -> None:
    items = [
        Item(id=i, probe=p, kind="nll", prompt="a", target="b", tags=[t], cluster=c)
        for i, p, t, c in (
            ("1", "x", "rare", "c"),
            ("1", "y", "target", None),
            ("2", "x", "guardrail", "c"),
        )
    ]
    x, y = read_probes(MODEL, TOKENIZER, items, 0)
    assert (x.name, x.n, x.tags) == ("x", 2, ("guardrail", "rare"))
    assert (y.name, y.n, y.tags) == ("y", 1, ("target",))
    assert (x.clusters, y.clusters) == ({"1": "c", "2": "c"}, {"1": "1"})


def test_cloze_is_right_where_each_token_is_the_likeliest() -> None:
    answer = greedy([tiny.BOS, *ids("cat")], 3)
    wrong = answer[:2] + ("b" if answer[2] == "a" else "a")
    items = [
        Item(id=target, probe="last", kind="cloze", prompt="cat", target=target)
        for target in (answer, wrong)
    ]
    one = reading(items)
    assert one.items == {answer: 1.0, wrong: 0.0}
    assert one.unit == "accuracy"


@pytest.mark.parametrize("norm", ["none", "characters", "bytes"])
def test_a_choice_is_normalised_by_its_own_length(norm: Any) -> None:
    """Without the delimiter; the expected choice is computed from the logits."""
    choices = ["a", "bcd", "efgh", "xyz12"]
    scores = []
    for choice in choices:
        length = 1 if norm == "none" else len(choice)
        scores.append(sum(logp([tiny.BOS, *ids("abc")], ids(f" {choice}"))) / length)
    best = max(range(4), key=scores.__getitem__)
    item = {"id": "1", "probe": "p", "kind": "choice", "prompt": "abc", "choices": choices}
    item |= {"delimiter": " ", "norm": norm, "answer": choices[best]}
    one = reading([Item.model_validate(item)])
    assert (one.value, one.answers) == (1.0, {"1": choices[best]})


def test_choices_may_have_a_prompt_each() -> None:
    """Winogrande's: the same end after different beginnings."""
    prompts = ["the cat", "a dog", "12"]
    scores = [sum(logp([tiny.BOS, *ids(prompt)], ids(" ran"))) for prompt in prompts]
    best = max(range(3), key=scores.__getitem__)
    item = Item(
        id="1",
        probe="p",
        kind="choice",
        prompt="",
        prompts=prompts,
        choices=[" ran"] * 3,
        answer=best,
        norm="none",
    )
    assert reading([item]).value == 1.0
    assert reading([item.model_copy(update={"answer": (best + 1) % 3})]).value == 0.0


def test_a_stop_string_that_begins_in_the_prompt_ends_no_answer() -> None:
    """As in lm-eval; transformers' own criterion would end it after its first token."""
    answer = greedy([tiny.BOS, *ids("cat")], 4)
    item = Item(
        id="1",
        probe="p",
        kind="exact",
        prompt="cat",
        target=answer,
        stop=[f"t{answer[0]}"],
        max_new_tokens=4,
    )
    assert reading([item]).answers == {"1": answer}


def test_examples_to_practise_on_are_not_read() -> None:
    first = Item(id="1", probe="p", kind="nll", prompt="a", target="b")
    other = Item(id="2", probe="p", kind="nll", prompt="a", target="c", tags=["recovery"])
    (one,) = read_probes(MODEL, TOKENIZER, [first, other], 0)
    assert list(one.items) == ["1"]
    assert read_probes(MODEL, TOKENIZER, [other], 0) == []


def test_code_is_run_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the sandbox is the prompt with its answer, and the tests."""
    from holdfast.meters import sandbox

    answer = greedy([tiny.BOS, *ids("cat")], 4)
    item = Item(
        id="1",
        probe="p",
        kind="code",
        prompt="cat",
        tests="assert cat",
        stop=["\n\n"],
        max_new_tokens=4,
    )
    with pytest.raises(RequestError, match=r"item '1' of 'p': a code item .* run_generated_code"):
        read_probes(MODEL, TOKENIZER, [item], 0)
    seen = []

    def run_all(jobs: Any, *, allowed: bool) -> Any:
        assert allowed
        seen.extend(jobs)
        return [sandbox.Outcome(True, "") for _ in jobs]

    monkeypatch.setattr(sandbox, "run_all", run_all)
    monkeypatch.setattr(sandbox, "run_code", lambda *_given, **_options: sandbox.Outcome(True, ""))
    (one,) = read_probes(MODEL, TOKENIZER, [item], 0, run_generated_code=True)
    assert seen == [(f"cat{answer}", "assert cat")]
    assert (one.value, one.answers) == (1.0, {"1": answer})


def test_an_item_longer_than_the_context_is_named_by_its_line(tmp_path: Path) -> None:
    """The tiny model takes 64 tokens, BOS among them; the last token is not read."""
    fits = {"id": "1", "probe": "p", "kind": "nll", "prompt": "a" * 60, "target": "bbbb"}
    rows = [fits, fits | {"id": "2", "target": "bbbbb"}, fits | {"id": "3", "target": "b" * 9}]
    file = tiny.jsonl(tmp_path / "items.jsonl", rows)
    with pytest.raises(RequestError) as caught:
        read_probes(MODEL, TOKENIZER, load_items([str(file)]), 0)
    second, third = caught.value.problems
    assert f"{file} line 2: 65 tokens do not fit the model's context of 64" in second
    assert f"{file} line 3: 69 tokens" in third
    written = [{"id": "1", "probe": "q", "kind": "exact", "prompt": "a" * 40, "target": "b"}]
    file = tiny.jsonl(tmp_path / "written.jsonl", written)
    with pytest.raises(RequestError, match=r"line 1: 72 tokens with an answer of 32 .*max_new"):
        read_probes(MODEL, TOKENIZER, load_items([str(file)]), 0)


@pytest.mark.parametrize("kind", ["exact", "nll"])
def test_a_model_of_nan_is_read_as_nan(kind: Any, tmp_path: Path) -> None:
    """And nothing is kept of it: whether that ends a run or is refused is up to who asked."""
    model = tiny.tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    item = Item(id="1", probe="p", kind=kind, prompt="a", target="b")
    results = Results(model, TOKENIZER, tmp_path / "kept")
    (found,) = read_probes(model, TOKENIZER, [item], 0, results=results)
    assert math.isnan(found.value)
    assert math.isnan(found.items["1"])
    assert not (tmp_path / "kept").exists()


def test_items_that_ask_the_same_are_one_cluster_in_one_half(tmp_path: Path) -> None:
    rows = [{"id": str(n), "probe": "p", "kind": "exact", "prompt": f"{n % 9}", "target": "b"}
            for n in range(30)]  # fmt: skip
    rows += [rows[0] | {"id": "own", "cluster": "mine"}, rows[0] | {"probe": "other"}]
    *items, own, other = load_items([str(tiny.jsonl(tmp_path / "p.jsonl", rows))])
    by_prompt = {item.prompt: (item.cluster, item.split) for item in items}
    assert [(item.cluster, item.split) for item in items] == [by_prompt[i.prompt] for i in items]
    assert len({cluster for cluster, _ in by_prompt.values()}) == 9
    # the half of the first of them is what it was without the others
    assert all(one.split == half_of(f"p/{one.id}") for one in items[:9])
    assert (own.cluster, other.cluster) == ("mine", None)


# ---- reading the files


def test_the_examples_of_the_page_are_sound(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "probes.md"
    file = tmp_path / "items.jsonl"
    file.write_text(page.read_text(encoding="utf-8").split("```")[1].strip(), encoding="utf-8")
    kinds = ["exact", "choice", "cloze", "number", "format", "code", "nll"]
    assert [item.kind for item in load_items([str(file)])] == kinds


GOOD = {"id": "1", "probe": "p", "kind": "nll", "prompt": "a", "target": "b"}


def test_items_are_read_from_several_files(tmp_path: Path) -> None:
    """Lines end at line feeds: the other separators that Unicode knows may stand in a text."""
    one = tmp_path / "one.jsonl"
    two = tiny.jsonl(tmp_path / "two.jsonl", [GOOD | {"probe": "q"}])
    odd = GOOD | {"prompt": "a\u2028b\x85c"}
    one.write_bytes(f"\r\n{json.dumps(odd, ensure_ascii=False)}\r\n\n".encode())
    first, second = load_items([str(one), str(two)])
    assert first.prompt == "a\u2028b\x85c"
    assert (first.id, first.probe, second.id, second.probe) == ("1", "p", "1", "q")
    assert load_items([]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "essay"}, "kind"),
        ({"promt": "a"}, "promt"),
        ({"target": "  "}, "target: a nll item needs one"),
        ({"kind": "exact", "target": None}, "target: a exact item needs one"),
        ({"kind": "choice", "choices": ["a"], "answer": 0}, "needs at least two"),
        ({"kind": "choice", "choices": ["a", "b"], "answer": 2}, "2 is not an index"),
        ({"kind": "choice", "choices": ["a", "b"], "answer": -1}, "-1 is not an index"),
        ({"kind": "choice", "choices": ["a", "b"]}, "None is not an index"),
        (
            {"kind": "choice", "choices": ["a", "b"], "answer": "c"},
            "'c' is not among the choices 'a', 'b'",
        ),
        (
            {"kind": "choice", "choices": ["a", "a "], "answer": "a"},
            "'a' is more than once among the choices",
        ),
        ({"kind": "choice", "choices": ["a", ""], "answer": 0}, "one is empty"),
        (
            {"kind": "choice", "choices": ["a", "b"], "answer": 0, "prompts": ["x"]},
            "prompts: 1 for 2 choices",
        ),
        ({"choices": ["a", "b"]}, "choices: a nll item has none"),
        ({"target": ["b", "c"]}, "target: a nll item has one"),
        ({"kind": "cloze", "target": None}, "target: a cloze item needs one"),
        ({"kind": "number", "target": "many"}, "'many' is no number"),
        ({"kind": "format"}, "checks: a format item needs one"),
        ({"kind": "format", "checks": [{"check": "rhyme"}]}, "checks"),
        (
            {"kind": "format", "checks": [{"check": "json", "json_schema": {"type": "int"}}]},
            "no JSON Schema",
        ),
        ({"kind": "code"}, "tests: a code item needs some"),
        ({"kind": "exact", "extract": {"pattern": "("}}, "no regular expression"),
        ({"kind": "exact", "compare": {"ignore": ["["]}}, "no regular expression"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"tags": ["nice"]}, "tags"),
        ({"tags": ["rare"]}, "'p' holds items tagged guardrail, and a probe is judged as one"),
        ({"tags": ["recovery"]}, None),
        ({"probe": "other", "id": "0"}, None),
    ],
)
def test_a_faulty_item_is_named_by_its_line(
    tmp_path: Path, change: dict[str, Any], said: str | None
) -> None:
    file = tiny.jsonl(tmp_path / "items.jsonl", [GOOD, GOOD | {"id": "2"} | change])
    if said is None:
        assert len(load_items([str(file)])) == 2
        return
    with pytest.raises(RequestError) as caught:
        load_items([str(file)])
    assert f"{file} line 2: " in str(caught.value)
    assert said in str(caught.value)


def test_all_faulty_lines_are_named_at_once(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "items.jsonl", [GOOD, GOOD, GOOD | {"id": "2", "kind": "exact"}])
    with file.open("a") as out:
        out.write("{\n")
    with pytest.raises(RequestError) as caught:
        load_items([str(file)])
    twice, mixed, torn = caught.value.problems
    assert f"{file} line 2: id '1' was used in {file} line 1" in twice
    assert f"{file} line 3: probe 'p' holds nll items, and" in mixed
    assert f"{file} line 4: is not JSON" in torn


def test_no_file_and_no_item_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        load_items([str(tmp_path / "none.jsonl")])
    empty = tiny.jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(RequestError, match="no items in"):
        load_items([str(empty)])


# ---- halves


def named(name: str, cluster: str | None = None) -> Item:
    return Item(id=name, probe="p", kind="nll", prompt="a", target="b", cluster=cluster)


@given(st.lists(st.tuples(st.text(), st.none() | st.sampled_from("abcdef")), unique=True))
def test_what_is_not_independent_is_in_one_half(drawn: list[tuple[str, str | None]]) -> None:
    """Any order, any company: the half of an item is that of its cluster, or its own."""
    items = [named(name, cluster) for name, cluster in drawn]
    halves = {item.cluster: item.split for item in items if item.cluster is not None}
    assert all(item.split == halves.get(item.cluster, item.split) for item in items)
    assert [named(*one).split for one in drawn] == [item.split for item in items]


def test_about_half_of_the_items_fall_to_each_half() -> None:
    """Binomial with n = 1000 and p = 1/2: 500, sd 15.8; within five of these."""
    assert abs(sum(named(f"{n}").split == "sealed" for n in range(1000)) - 500) < 79


def test_the_two_halves_are_read_apart() -> None:
    items = [named(f"{n}") for n in range(12)]
    (whole,) = read_probes(MODEL, TOKENIZER, items, 0)
    parts = [read_probes(MODEL, TOKENIZER, items, 0, split=half)[0] for half in HALVES]
    assert [part.split for part in parts] == list(HALVES)
    assert parts[0].items.keys() | parts[1].items.keys() == whole.items.keys()
    assert not parts[0].items.keys() & parts[1].items.keys()
    require_both_halves(items)
    with pytest.raises(RequestError, match=r"^probes: 'p' has no item in the \w+ split"):
        require_both_halves(items[:1])
