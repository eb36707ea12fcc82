"""Continuations scored together, against each one alone in plain forward passes in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from holdfast.errors import RequestError
from holdfast.meters import likelihood
from holdfast.meters.likelihood import Question, groups, likelihoods

NAMES = ("Llama", "GPT2", "Gemma2", "OPT", "Mixtral", "GPTNeoX", "Cohere")
MODELS = {name: tiny.tiny(name) for name in NAMES}
DOUBLES = {name: tiny.tiny(name, experts_implementation="eager").double() for name in NAMES}

tokens = st.lists(st.integers(0, tiny.VOCABULARY - 1), min_size=1, max_size=6)
questions = st.lists(
    st.builds(
        lambda shots, own, more: Question([7, 8, 9] * shots + own, more),
        st.integers(0, 4),
        tokens,
        st.lists(tokens, min_size=1, max_size=4),
    ),
    max_size=7,
)


def alone(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The sum of log softmax, and whether each token is the likeliest: one text, no padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0]
    rows = logits[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    logp = rows.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(logp), bool((rows.argmax(-1) == wanted).all())


@given(questions, st.integers(1, 120), st.sampled_from(NAMES))
@settings(max_examples=30, deadline=None)
def test_likelihoods_are_those_of_each_text_alone(
    asked: list[Question], budget: int, name: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "CPU_PASS_TOKENS", 0)  # so that small prefixes are shared too
        found = likelihoods(MODELS[name], asked, batch_tokens=budget)
    for question, answers in zip(asked, found, strict=True):
        for continuation, answer in zip(question.continuations, answers, strict=True):
            logp, greedy = alone(DOUBLES[name], question.context, continuation)
            assert answer.logp == pytest.approx(logp, abs=1e-4)
            assert (answer.greedy, answer.tokens) == (greedy, len(continuation))


@pytest.mark.parametrize("name", NAMES)
def test_these_architectures_share(name: str) -> None:
    with torch.inference_mode():
        assert likelihood._longest_shared(MODELS[name]) > 0


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions that each forward pass computes, from the real passes."""
    seen: list[int] = []
    real = likelihood._read

    def read(model: Any, rows: Any, *given: Any) -> Any:
        seen.append(sum(len(row.ids) for row in rows))
        return real(model, rows, *given)

    monkeypatch.setattr(likelihood, "_read", read)
    return seen


@pytest.mark.parametrize("window", [4, 40])
def test_a_text_beyond_the_sliding_window_is_read_alone(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = ["sliding_attention", "full_attention"]
    model = tiny.tiny("Gemma2", sliding_window=window, layer_types=layers)
    question = Question([*range(20)], [[3, 4, 5, 6], [30, 31, 32], [9]])
    seen = spied(monkeypatch)
    (answers,) = likelihoods(model, [question])
    expected = [alone(model, question.context, more)[0] for more in question.continuations]
    assert [answer.logp for answer in answers] == pytest.approx(expected, abs=1e-4)
    assert seen[-1] == (25 if window == 40 else 20 + 23 + 22)


@pytest.mark.parametrize("window", [14, 40])
def test_one_mask_serves_all_rows_behind_a_prefix(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a text beyond the sliding window transformers' own mask is taken."""
    layers = ["sliding_attention", "full_attention"]
    model = tiny.tiny("Gemma2", sliding_window=window, layer_types=layers)
    monkeypatch.setattr(likelihood, "CPU_PASS_TOKENS", 1)
    seen = spied(monkeypatch)
    questions = [
        Question([*range(20), *rest], [[5], [6]]) for rest in ([30], [31, 32], [33, 34, 35])
    ]
    found = likelihoods(model, questions)
    expected = [alone(model, q.context, more)[0] for q in questions for more in q.continuations]
    assert [a.logp for answers in found for a in answers] == pytest.approx(expected, abs=1e-4)
    assert seen[-1] == 1 + 2 + 3


def test_an_architecture_that_cannot_share_has_a_row_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mask that goes unheeded is found out by the trial."""
    model, real = MODELS["Llama"], likelihood._mask
    question = Question([1, 2, 3], [[4, 5], [6, 7, 8], [9]])
    (expected,) = likelihoods(model, [question])
    monkeypatch.setattr(likelihood, "_mask", lambda *given: torch.zeros_like(real(*given)))
    (found,) = likelihoods(model, [question])
    assert [a.logp for a in found] == pytest.approx([a.logp for a in expected], abs=1e-5)
    with torch.inference_mode():
        assert likelihood._longest_shared(model) == 0


def test_a_model_whose_logits_are_not_numbers_is_refused() -> None:
    model = tiny.tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(RequestError, match="not numbers"):
        likelihoods(model, [Question([1], [[2]])])


def test_training_mode_is_left_as_it_was() -> None:
    model = tiny.tiny("Llama").train()
    likelihoods(model, [Question([1], [[2, 3]])])
    assert model.training
    assert likelihoods(model, []) == []


# ---- which contexts share a prefix


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), max_size=12))
def test_groups_hold_each_context_once_and_share_what_they_say(contexts: Any) -> None:
    found = groups(contexts, cost=3)
    assert sorted(i for numbers, _ in found for i in numbers) == list(range(len(contexts)))
    for numbers, length in found:
        assert all(len(contexts[i]) > length for i in numbers)
        assert len({tuple(contexts[i][:length]) for i in numbers}) == 1
    without = sum(map(len, contexts))
    spent = sum(
        length + 3 * (length > 0) + sum(len(contexts[i]) - length for i in numbers)
        for numbers, length in found
    )
    assert spent <= without


def test_two_subjects_have_a_prefix_each() -> None:
    """What both begin with is short; what each subject's questions begin with is long."""
    contexts = [[0, subject, *([subject] * 50), 3 + i] for i in range(5) for subject in (1, 2)]
    found = groups(contexts, cost=20)
    assert sorted((sorted(n), length) for n, length in found) == [
        ([0, 2, 4, 6, 8], 52),
        ([1, 3, 5, 7, 9], 52),
    ]
    assert groups(contexts, cost=10_000) == [(sorted(range(10), key=contexts.__getitem__), 0)]
