"""Routing of tiny random mixtures of experts: counted by hand, and planted changes found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy.spatial.distance import jensenshannon
from torch import nn

import tiny
from holdfast.errors import RequestError
from holdfast.levers.adapter import Adapter
from holdfast.meters import Reading
from holdfast.meters.canary import Document, document
from holdfast.meters.drift import Start
from holdfast.meters.experts import (
    expert_drift,
    jensen_shannon,
    read_busiest,
    read_expert_drift,
    read_experts,
    unseen_experts,
)
from holdfast.meters.routing import Routing, read_routing, routers

MOE: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen2Moe": tiny.GROUPED
    | {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Olmoe": tiny.GROUPED | {"num_experts": 6, "num_experts_per_tok": 3},
}


def moe(name: str, **more: Any) -> Any:
    if name == "Mixtral":
        return tiny.tiny(name, **more)
    import transformers

    config = getattr(transformers, f"{name}Config")(**tiny.SIZE | MOE[name] | more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def made(domain: str, count: int, first: int = 0, letters: int = 40) -> list[Document]:
    """Sealed documents of 5 to 12 tokens, two from each source."""
    random = np.random.default_rng([first, count])
    found: list[Document] = []
    number = 0
    while len(found) < count:
        ids = [tiny.BOS, *(first + random.integers(0, letters, 4 + number % 8)).tolist()]
        one = document(ids, [False] + [True] * (len(ids) - 1), domain, f"{domain} {number // 2}")
        found += [one] * (one.split == "sealed")
        number += 1
    return found


def by_hand(model: Any, doc: Document) -> list[list[list[int]]]:
    """Each layer's and token's top-k by transformers' own `output_router_logits`."""
    model.config.output_router_logits = True
    with torch.no_grad():
        out = model.base_model(
            input_ids=torch.tensor([doc.text.input_ids]), output_router_logits=True
        )
    model.config.output_router_logits = False
    top_k = model.config.num_experts_per_tok
    return [
        logits.reshape(len(doc.text.input_ids), -1).topk(top_k).indices.sort(-1).values.tolist()
        for logits in out.router_logits
    ]


@pytest.mark.parametrize("name", MOE)
def test_what_the_routers_chose_is_what_their_logits_say(name: str) -> None:
    model, documents = moe(name), [*made("prose", 9), *made("code", 5, 10, 30)]
    model.train()
    found = read_routing(model, documents, "sealed")
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert len(found.layers) == 2
    assert found.documents == tuple(documents)
    for doc, chosen in zip(documents, found.chosen, strict=True):
        assert [layer.tolist() for layer in chosen] == by_hand(model, doc)


def test_shares_and_pairs_are_counted() -> None:
    """Two tokens to experts (0, 1), one to (1, 3)."""
    docs = (document([1, 2, 3], [False, True, True], "d"),)
    chosen = (np.array([[0, 1], [0, 1], [1, 3]], dtype=np.int16),)
    found = Routing(docs, ("layer",), (4,), (chosen,), 0.0)
    assert found.shares()["layer"].tolist() == pytest.approx([2 / 6, 3 / 6, 0, 1 / 6])
    pairs = found.pairs()["layer"]
    assert {(int(e), int(f)): pairs[e, f] for e, f in np.argwhere(pairs)} == {
        (0, 1): pytest.approx(2 / 3), (1, 3): pytest.approx(1 / 3)}  # fmt: skip
    assert found.shares("elsewhere")["layer"].tolist() == [0, 0, 0, 0]


shares = st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any)


@given(shares, shares)
@settings(max_examples=60, deadline=None)
def test_jensen_shannon_is_scipys(p: list[int], q: list[int]) -> None:
    found = float(jensen_shannon(np.array(p, float), np.array(q, float)))
    assert found == pytest.approx(float(jensenshannon(p, q)) ** 2, abs=1e-9)
    assert 0 <= found <= math.log(2) + 1e-12


def named(readings: list[Reading]) -> dict[tuple[str, str], Reading]:
    return {(r.meter, r.name): r for r in readings}


@pytest.mark.parametrize("name", MOE)
def test_a_planted_change_is_found_where_it_is(name: str) -> None:
    """The second layer's router swaps two experts: the first layer's routing stays as it was."""
    base, model = moe(name), moe(name)
    documents = [*made("prose", 12), *made("code", 12, 20, 5)]
    layers = list(routers(model).modules)  # type: ignore[union-attr]
    gate = routers(model).modules[layers[1]]  # type: ignore[union-attr]
    with torch.no_grad():
        gate.weight[[0, 1]] = gate.weight[[1, 0]].clone()
    before, after = (read_routing(m, documents, "sealed") for m in (base, model))
    found = named(read_experts(before, after, 4))
    for domain in ("prose", "code"):
        docs = [n for n, d in enumerate(documents) if d.domain == domain]
        counts = [
            np.bincount(np.concatenate([r.chosen[n][1].ravel() for n in docs]), minlength=8)
            for r in (before, after)
        ]
        expected = float(jensenshannon(*counts)) ** 2
        assert counts[0][[1, 0]].tolist() == counts[1][[0, 1]].tolist()  # nothing else has moved
        layer = found["routing", f"{domain}/{layers[1]}"]
        assert layer.value == pytest.approx(expected, abs=1e-12)
        assert found["routing", f"{domain}/{layers[0]}"].value == 0.0
        assert found["routing", f"{domain}/{layers[0]}"].stderr == 0.0
        assert found["routing", domain].value == pytest.approx(expected / 2, abs=1e-12)
        changed = found["routing_changed", domain]
        lone = [  # a set changes where one of the two experts was in it, not both or none
            np.mean([((token < 2).sum() == 1) for token in before.chosen[n][1]]) / 2 for n in docs
        ]
        assert changed.value == pytest.approx(float(np.mean(lone)))
        assert changed.value > 0
        assert (changed.n, changed.unit, changed.step) == (12, "share", 4)
        assert found["coactivation", domain].value >= 0
        shifts = {n: r.value for (m, n), r in found.items() if m == "routing_shift"}
        swapped = (counts[0][1] - counts[0][0]) / counts[0].sum()
        assert {n: v for n, v in shifts.items() if n.startswith(domain)} == (
            {f"{domain}/{layers[1]}/0": pytest.approx(swapped),
             f"{domain}/{layers[1]}/1": pytest.approx(-swapped)}
        )  # fmt: skip


def test_the_base_against_itself_has_not_changed() -> None:
    routing = read_routing(moe("Mixtral"), made("d", 6), "sealed")
    for reading in read_experts(routing, routing, 0):
        assert reading.value == 0.0


def test_the_error_is_that_of_other_documents() -> None:
    """The bootstrap's error against the spread over 16 fresh sets of documents."""
    base, model = moe("Mixtral"), moe("Mixtral")
    with torch.no_grad():
        for router in routers(model).modules.values():  # type: ignore[union-attr]
            router.weight += 0.2 * torch.randn(
                router.weight.shape, generator=torch.Generator().manual_seed(1)
            )
    many = made("d", 640)
    values, errors = [], []
    before, after = (read_routing(m, many, "sealed") for m in (base, model))
    for first in range(0, 640, 40):
        part = slice(first, first + 40)
        pair = (
            Routing(r.documents[part], r.layers, r.experts, r.chosen[part], 0.0)
            for r in (before, after)
        )
        reading = named(read_experts(*pair, 0))["routing", "d"]
        values.append(reading.value)
        errors.append(reading.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.5)
    again = read_experts(before, after, 0, seed=1)
    assert [r.stderr for r in again] != [r.stderr for r in read_experts(before, after, 0)]


def test_an_adapter_around_routers_and_experts_is_looked_through() -> None:
    """At zero drift the routing of the base; when its routers moved, that of the merged model."""
    base: Any = moe("Mixtral")
    gates = [n for n, p in base.named_parameters() if p.ndim == 3 or "gate.weight" in n]
    assert len(gates) == 6
    config = LoraConfig(r=2, target_parameters=gates)
    model = get_peft_model(moe("Mixtral"), config)
    documents = made("d", 8)
    before, after = (read_routing(m, documents, "sealed") for m in (base, model))
    assert before.layers == after.layers
    assert all(r.value == 0.0 for r in read_experts(before, after, 0))
    tiny.moved(model, 0.3)
    moved = read_routing(model, documents, "sealed")
    merged = read_routing(model.merge_and_unload(), documents, "sealed")
    assert named(read_experts(before, moved, 0))["routing_changed", "d"].value > 0.1
    assert named(read_experts(merged, moved, 0))["routing_changed", "d"].value < 0.02


def test_other_documents_or_models_are_refused() -> None:
    one, other = (read_routing(moe("Mixtral"), made("d", n), "sealed") for n in (3, 4))
    with pytest.raises(RequestError, match="other documents"):
        read_experts(one, other, 0)
    with pytest.raises(RequestError, match="LlamaForCausalLM has no router"):
        read_routing(tiny.tiny("Llama"), made("d", 3), "sealed")
    assert routers(tiny.tiny("Llama")) is None


def test_a_router_without_numbers_is_refused() -> None:
    model = moe("Mixtral")
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = math.nan
    with pytest.raises(RequestError, match="not numbers"):
        read_routing(model, made("d", 3), "sealed")


def planted(shares: list[list[float]], domain: str) -> Routing:
    """A layer of four experts, one each token; a document for each list of shares of 20 tokens."""
    chosen = tuple(
        (np.repeat(np.arange(4), [round(20 * s) for s in row])[:, None].astype(np.int16),)
        for row in shares
    )
    docs = tuple(document([n], [True], domain) for n in range(len(shares)))
    return Routing(docs, ("model.layers.0.mlp",), (4,), chosen, 0.0)


def test_the_busiest_experts_take_more_than_half() -> None:
    found = named(read_busiest(planted([[0.3, 0.1, 0.2, 0.4], [0.5, 0.1, 0.2, 0.2]], "d"), 2))
    loads = {name: r for (meter, name), r in found.items() if meter == "expert_load"}
    assert {name: r.value for name, r in loads.items()} == pytest.approx(
        {"model.layers.0.mlp/0": 0.4, "model.layers.0.mlp/3": 0.3})  # fmt: skip
    # two documents, shares 0.3 and 0.5: the standard error of their mean
    assert loads["model.layers.0.mlp/0"].stderr == pytest.approx(0.1)
    entropy = -sum(p * math.log(p) for p in (0.4, 0.1, 0.2, 0.3))
    in_use = found["experts_in_use", "model.layers.0.mlp"].value
    assert in_use == pytest.approx(math.exp(entropy))


def test_a_narrow_lesson_that_no_probe_reaches_is_told() -> None:
    lesson = planted([[0.6, 0.05, 0.3, 0.05]], "lesson")
    reached = planted([[0.3, 0.2, 0.3, 0.2]], "canary")
    unreached = planted([[0.05, 0.35, 0.3, 0.3]], "canary")
    assert unseen_experts(lesson, reached) == []
    (told,) = unseen_experts(lesson, unreached)
    assert "'model.layers.0.mlp'" in told
    assert "0 (60% of the lesson's tokens, 5.0% of the probes')" in told
    assert unseen_experts(unreached, unreached) == []
    assert unseen_experts(lesson, unreached, {"model.layers.0.mlp": [0.9, 0.1, 0.1, 0.1]}) == [told]
    assert unseen_experts(lesson, unreached, {"model.layers.0.mlp": [0.0, 0.1, 0.9, 0.1]}) == []
    assert unseen_experts(lesson, unreached, {}) == []  # nothing of the layer was trained


@pytest.mark.parametrize("adapter", [False, True])
def test_displacement_is_that_of_each_expert(adapter: bool) -> None:
    """A planted move of one expert, in the layer that its router names too."""
    model: Any = moe("Mixtral")
    layer = list(routers(model).modules)[1]  # type: ignore[union-attr]
    if adapter:
        model = Adapter(r=2, target="all-linear").wrap(model)
    start = Start(model)
    if adapter:
        tiny.moved(model)
        found = expert_drift(start)
        assert sorted(found) == list(routers(model).modules)  # type: ignore[union-attr]
        assert all(value > 0 for values in found.values() for value in values)
        return
    experts = model.get_submodule(layer).experts
    with torch.no_grad():
        size = math.hypot(experts.gate_up_proj[3].norm(), experts.down_proj[3].norm())
        experts.gate_up_proj[3] += 0.1
    moved = 0.1 * math.sqrt(experts.gate_up_proj[3].numel())
    readings = {r.name: r.value for r in read_expert_drift(start, 1) if r.value}
    assert readings == {f"{layer}/3": pytest.approx(moved / size, rel=1e-4)}


def test_experts_that_are_modules_of_their_own_count_too() -> None:
    model: Any = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
    start = Start(model)
    with torch.no_grad():
        size = math.hypot(*(p.norm() for p in model.mlp.experts[1].parameters()))
        model.mlp.experts[1].bias += 0.5
    moved = 0.5 * math.sqrt(2)
    assert expert_drift(start) == {"mlp": [0.0, pytest.approx(moved / size, rel=1e-5), 0.0]}
