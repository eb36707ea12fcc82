"""KL of two models, against torch's own over whole logits, one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import tiny
from holdfast.levers.adapter import Adapter
from holdfast.meters.canary import Document, document
from holdfast.meters.kl import mean_kls, read_kl
from holdfast.meters.scoring import Scored
from holdfast.reference.adapter_off import AdapterOff
from holdfast.reference.frozen import Frozen

BASE = tiny.tiny("Llama")


def tuned(name: str = "Llama") -> Any:
    model = tiny.tiny(name)
    tiny.moved(model, 0.05)
    return model


def made(domain: str, count: int) -> list[Document]:
    """Documents of 4 to 11 tokens with holes in what is scored, two from each source."""
    return [
        document(
            [tiny.BOS, *((7 * i + j * j) % 40 for j in range(3 + i % 8))],
            [False, *(j != 1 for j in range(3 + i % 8))],
            domain,
            f"{domain} row {i // 2}",
        )
        for i in range(count)
    ]


def by_hand(model: Any, base: Any, text: Scored) -> float:
    """sum_v p (log p - log q), by torch, in float64."""
    ids = torch.tensor([text.input_ids])
    with torch.no_grad():
        q, p = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (model, base))
    kl = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return float(kl[torch.tensor(text.loss_mask[1:])].mean())


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_it_is_torchs_own_over_the_whole_vocabulary(name: str) -> None:
    base, model = tiny.tiny(name), tuned(name)
    texts = [d.text for d in made("prose", 9)]
    found = mean_kls(model, Frozen.copy_of(base), texts)
    expected = [by_hand(model, base, text) for text in texts]
    assert min(expected) > 1e-3
    assert found == pytest.approx(expected, rel=1e-3)


def test_it_is_zero_for_the_base_itself() -> None:
    assert mean_kls(BASE, Frozen.copy_of(BASE), [d.text for d in made("d", 5)]) == [0.0] * 5


def test_the_base_may_be_the_model_without_its_adapter() -> None:
    model: Any = Adapter(r=2).wrap(tiny.tiny("Llama"))
    reference = AdapterOff(model)
    tiny.moved(model, 0.3)
    texts = [d.text for d in made("d", 4)]
    expected = [by_hand(model, BASE, text) for text in texts]
    assert min(expected) > 1e-4
    assert mean_kls(model, reference, texts) == pytest.approx(expected, rel=1e-3)


def test_a_reading_a_domain_of_its_split_with_clustered_errors() -> None:
    from holdfast.gate.stats import stderr_of_mean

    model, documents = tuned(), [*made("prose", 30), *made("code", 30)]
    model.train()
    readings = read_kl(model, Frozen.copy_of(BASE), documents, "sealed", 7, on="old")
    assert model.training
    assert [r.name for r in readings] == ["old/code", "old/prose"]
    for reading in readings:
        chosen = [d for d in documents if f"old/{d.domain}" == reading.name]
        chosen = [d for d in chosen if d.split == "sealed"]
        values = [by_hand(model, BASE, d.text) for d in chosen]
        assert reading.value == pytest.approx(sum(values) / len(values), rel=1e-3)
        expected = stderr_of_mean(values, [d.cluster for d in chosen])
        assert reading.stderr == pytest.approx(expected, rel=1e-3)
        assert reading.items == pytest.approx(
            dict(zip([d.id for d in chosen], values, strict=True)), rel=1e-3
        )
        assert (reading.meter, reading.unit, reading.step) == ("kl", "nats", 7)
        assert reading.n == len(chosen)
        assert reading.seconds > 0


def test_a_document_with_nothing_to_score_is_left_out() -> None:
    empty = document([tiny.BOS, 3], [False, False], "d", "d row 0")
    full = document([tiny.BOS, 3], [False, True], "d", "d row 0")
    readings = read_kl(tuned(), Frozen.copy_of(BASE), [empty, full], full.split, 0, on="new")
    assert [(r.name, r.n) for r in readings] == [("new/d", 1)]
