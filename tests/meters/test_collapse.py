"""Label collapse of a model whose answers are planted, and of one by whole logits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

import tiny
from holdfast.errors import RequestError
from holdfast.meters.canary import Document, document
from holdfast.meters.collapse import labels_of, read_collapse
from holdfast.meters.scoring import Scored

YES, NO, MAYBE = [1, 2, tiny.EOS], [3, tiny.EOS], [4, 5, 6, tiny.EOS]


def row(number: int, label: list[int]) -> Document:
    prompt = [tiny.BOS, 10 + number % 30, 10 + number // 30]
    return document([*prompt, *label], [False] * 3 + [True] * len(label), "heldout", f"{number}")


def rows(labels: list[list[int]]) -> list[Document]:
    return [d for d in (row(n, label) for n, label in enumerate(labels)) if d.split == "sealed"]


def likeliest(model: Any, doc: Document, labels: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The definition: the sum of log-probabilities of each label's tokens, from whole logits."""
    prompt, scores = doc.text.input_ids[:3], {}
    for label in labels:
        ids = torch.tensor([[*prompt, *label]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
        scores[label] = sum(float(logp[2 + i, token]) for i, token in enumerate(label))
    return max(scores, key=lambda label: scores[label])


def test_predictions_are_the_likeliest_labels() -> None:
    model = tiny.tiny("Llama")
    documents = rows([(YES, NO, MAYBE)[n % 3] for n in range(60)])
    labels = labels_of(d.text for d in documents)
    assert sorted(labels) == sorted(map(tuple, (YES, NO, MAYBE)))
    found = {r.name: r for r in read_collapse(model, documents, labels, "sealed", 5)}
    predicted = [likeliest(model, d, labels) for d in documents]
    truth = [tuple(d.text.input_ids[3:]) for d in documents]
    (majority, count), *_ = Counter(predicted).most_common(1)
    n = len(documents)
    says, holds = count / n, truth.count(majority) / n
    assert found["majority_share"].value == pytest.approx(says)
    assert found["majority_share_of_truth"].value == pytest.approx(holds)
    assert found["excess"].value == pytest.approx(says - holds)
    for name, of in (("entropy", predicted), ("entropy_of_truth", truth)):
        entropy = -sum(c / n * math.log(c / n) for c in Counter(of).values())
        assert found[name].value == pytest.approx(entropy)
    assert found["entropy"].value > 0  # it does say more than one
    gaps = [(p == majority) - (t == majority) for p, t in zip(predicted, truth, strict=True)]
    mean = sum(gaps) / n
    stderr = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (n - 1) / n)
    assert found["excess"].stderr == pytest.approx(stderr)
    assert all(r.n == n and r.step == 5 for r in found.values())


def test_a_collapsed_model_is_found() -> None:
    """A head whose bias says one label always: its share is 1, its entropy 0, with an error."""
    model: Any = tiny.tiny("Llama")
    model.lm_head = torch.nn.Linear(32, tiny.VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias[[3, tiny.EOS]] = 20.0
    documents = rows([YES, NO] * 20)
    labels = labels_of(d.text for d in documents)
    found = {r.name: r for r in read_collapse(model, documents, labels, "sealed", 0)}
    share = sum(d.text.input_ids[3:] == NO for d in documents) / len(documents)
    assert found["majority_share"].value == 1.0
    assert found["majority_share"].stderr > 0
    assert found["majority_share_of_truth"].value == share
    assert found["excess"].value == pytest.approx(1 - share)
    assert found["entropy"].value == 0.0
    assert found["entropy_of_truth"].value > 0.6


@pytest.mark.parametrize(
    ("labels", "classifies"),
    [
        ([YES, NO] * 4, True),
        ([YES, NO] * 3 + [NO], False),  # seven rows of two labels
        ([YES] * 20, False),
        ([[n, tiny.EOS] for n in range(10)] * 2, False),
        ([[n, tiny.EOS] for n in range(33)] * 9, False),
    ],
)
def test_a_lesson_classifies_if_its_responses_are_few(
    labels: list[list[int]], classifies: bool
) -> None:
    assert bool(labels_of(row(n, label).text for n, label in enumerate(labels))) is classifies


def test_bad_input_is_refused() -> None:
    model = tiny.tiny("Llama")
    documents = rows([YES, NO] * 10)
    labels = [tuple(YES), tuple(NO)]
    with pytest.raises(RequestError, match="fewer than 2 labels"):
        read_collapse(model, documents, labels[:1], "sealed", 0)
    with pytest.raises(RequestError, match="is none of the lesson's 2 labels"):
        read_collapse(model, rows([YES, MAYBE] * 10), labels, "sealed", 0)
    assert read_collapse(model, [], labels, "sealed", 0) == []
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(RequestError, match="not numbers"):
        read_collapse(model, documents, labels, "sealed", 0)


def test_an_empty_text_has_no_label() -> None:
    assert labels_of([Scored([1, 2], [False, False])] * 9) == []
