"""Squared gradients of single rows, against one backward pass of autograd for each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from holdfast.data.example import Example
from holdfast.errors import RequestError
from holdfast.fisher import Factored, Importance, fisher, kept, size
from holdfast.levers.adapter import Adapter
from holdfast.per_sequence import Flat, Lookup, Outer, Total, Use

CPU = torch.device("cpu")
LENGTHS = (3, 11, 7, 7, 2, 12)


def examples(lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> list[Example]:
    """Rows of tokens, of which some are not learned; the padding token is among them."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(0, tiny.VOCABULARY, (n,), generator=random).tolist()
        rows.append(Example(ids, [False, *(i % 3 != 2 for i in range(1, n))]))
    rows[0].input_ids[1] = tiny.PAD
    return rows


def shaken(name: str, **settings: Any) -> Any:
    """A tiny model without biases of zero and norms of one."""
    model = tiny.tiny(name, **settings)
    tiny.moved(model, 0.05)
    return model


def looped(model: Any, rows: list[Example], weights: dict[str, Any]) -> dict[str, Tensor]:
    """The definition: forward, cross-entropy over whole logits, backward; one row after another."""
    was = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    positions = 0
    for row in rows:
        ids, learned = torch.tensor([row.input_ids]), torch.tensor(row.loss_mask[1:])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        targets = ids[0, 1:].masked_fill(~learned, -100)
        positions += int(learned.sum())
        nll = nn.functional.cross_entropy(logits, targets, reduction="sum")
        grads = torch.autograd.grad(nll, list(weights.values()), allow_unused=True)
        for name, grad in zip(weights, grads, strict=True):
            if grad is not None:
                found[name] += grad.square()
    for parameter, wanted in was.items():
        parameter.requires_grad_(wanted)
    return {name: value / positions for name, value in found.items()}


def far(found: dict[str, Importance], expected: dict[str, Tensor]) -> list[str]:
    """Weights whose F is off by more than 1e-5 of its norm.

    A key's bias moves all of a query's scores alike, so its gradient is rounding and nothing else:
    what is a billionth of the largest need not agree.
    """
    assert found.keys() == expected.keys()
    least = 1e-9 * max(float(value.norm()) for value in expected.values())
    wrong = []
    for name, value in found.items():
        assert isinstance(value, Tensor)
        assert value.shape == expected[name].shape
        if (value - expected[name]).norm() > 1e-5 * expected[name].norm() + least:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", tiny.EXTRA)
def test_every_weight_has_what_a_loop_over_rows_gives(name: str, tied: bool) -> None:
    """Norms, biases, experts, router, tied head with its cross terms; padded batches of several."""
    model = shaken(name, tie_word_embeddings=tied)
    weights = dict(model.named_parameters())
    found = fisher(model, examples(), weights, labels="empirical", batch_tokens=40)
    assert far(found, looped(model, examples(), weights)) == []


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral"])
def test_it_is_that_of_the_base_below_an_adapter(name: str) -> None:
    """The frozen matrices that adapters move, of a model that is not trained as a whole."""
    bare = shaken(name)
    everything = looped(bare, examples(), dict(bare.named_parameters()))
    model = Adapter(r=2, target="all-linear").wrap(bare)
    inner: Any = model
    weights = {
        n: p for n, p in inner.get_base_model().named_parameters() if "lora" not in n and p.ndim > 1
    }
    assert not any(p.requires_grad for p in weights.values())
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    found = fisher(model, examples(), weights, labels="empirical")
    renamed = {n.replace(".base_layer", ""): value for n, value in found.items()}
    assert far(renamed, {n: everything[n] for n in renamed}) == []
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_an_adapter_that_begins_elsewhere_is_part_of_the_model() -> None:
    """Experts too: their weight is then what the base and the adapter make together."""
    model: Any = Adapter(r=2, config={"init_lora_weights": False}).wrap(shaken("Mixtral"))
    merged = Adapter(r=2, config={"init_lora_weights": False}).wrap(shaken("Mixtral"))
    merged.load_state_dict(model.state_dict())
    plain: Any = merged.merge_and_unload().requires_grad_(True)  # type: ignore[operator]
    experts = {n: p for n, p in plain.named_parameters() if p.ndim == 3}
    weights = {
        n.replace(".base_layer", ""): p
        for n, p in model.get_base_model().named_parameters()
        if p.ndim == 3
    }
    found = fisher(model, examples(), weights, labels="empirical")
    assert far(found, looped(plain, examples(), experts)) == []


class Twice(nn.Module):
    """A layer whose matrix, norm and bias are used twice in a forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(torch.tanh(self.layer(*args, **kwargs)), *args[1:], **kwargs)


@pytest.mark.parametrize("name", ["GPT2", "Qwen2"])
def test_a_module_called_twice_has_one_gradient(name: str) -> None:
    model: Any = shaken(name)
    decoder = model.get_decoder()
    blocks = decoder.h if name == "GPT2" else decoder.layers
    blocks[0] = Twice(blocks[0])
    if name != "GPT2":
        blocks[0].attention_type = blocks[0].layer.__dict__.get("attention_type", "full_attention")
    weights = dict(model.named_parameters())
    found = fisher(model, examples(), weights, labels="empirical")
    assert far(found, looped(model, examples(), weights)) == []


@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=6),
    st.integers(1, 60),
    st.sampled_from(["sampled", "empirical"]),
    st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_how_rows_are_batched_changes_nothing(
    lengths: list[int], batch_tokens: int, labels: Any, factored: bool
) -> None:
    """Sampled labels included: a row draws its own numbers."""
    model, rows = shaken("Llama", num_hidden_layers=1), examples(tuple(lengths))
    weights = dict(model.named_parameters())
    alone, together = (
        fisher(model, rows, weights, labels=labels, factored=factored, batch_tokens=n)
        for n in (1, batch_tokens)
    )
    largest = max(float(dense(found).max()) for found in alone.values())
    for name in weights:
        one, other = (dense(found[name]) for found in (alone, together))
        # a matrix that no gradient reaches (queries of a row of two tokens) holds rounding only
        floor = max(1e-5 * float(one.max()), 1e-9 * largest)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=floor)


def dense(importance: Importance) -> Tensor:
    return importance.dense() if isinstance(importance, Factored) else importance


def test_sampled_labels_are_the_models_own() -> None:
    """Against the exact Fisher of the head's bias at one position, diag(p) - p p'."""
    model: Any = tiny.tiny("Llama", tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.randn(tiny.VOCABULARY))
    row = Example([7, 3], [False, True])
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[7]]), use_cache=False).logits[0, 0].softmax(0)
    count = 4000
    found = fisher(model, [row] * count, {"bias": model.lm_head.bias}, seed=1)["bias"]
    assert isinstance(found, Tensor)
    exact = p * (1 - p)
    # one draw of (p - onehot)^2 is (1 - p)^2 with probability p, else p^2
    spread = (p * (1 - p) ** 4 + (1 - p) * p**4 - exact**2).clamp(min=1e-12).sqrt()
    assert float(((found - exact) / spread).abs().max()) * math.sqrt(count) < 4.5
    again = fisher(model, [row] * count, {"bias": model.lm_head.bias}, seed=1)["bias"]
    assert torch.equal(found, dense(again))
    other = fisher(model, [row] * count, {"bias": model.lm_head.bias}, seed=2)["bias"]
    assert not torch.equal(found, dense(other))


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 99),
    st.sampled_from(["outer", "two", "lookup", "outer+lookup", "flat"]),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_the_written_out_gradients(
    B: int, T: int, out: int, into: int, seed: int, kind: str
) -> None:
    """Diagonal, and rows and columns, whichever way they are found (Gram matrices, tokens seen)."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def outer() -> tuple[Use, Tensor]:
        left, right = noise(B, T, out), noise(B, T, into)
        return Outer(left, right), torch.einsum("bto,bti->boi", left, right)

    def lookup() -> tuple[Use, Tensor]:
        ids, grad = torch.randint(0, out, (B, T), generator=random), noise(B, T, into)
        onehot = nn.functional.one_hot(ids, out).double()
        return Lookup(ids, grad), torch.einsum("bto,bti->boi", onehot, grad)

    def flat() -> tuple[Use, Tensor]:
        grad = noise(B, out, into)
        return Flat(grad), grad

    makers = {"outer": [outer], "two": [outer, outer], "lookup": [lookup], "flat": [flat]}
    parts = [make() for make in makers.get(kind, [lookup, outer])]
    expected = torch.stack([grads for _, grads in parts]).sum(0).square().sum(0)
    weight = noise(out, into)
    for factored, sums in ((False, [expected]), (True, [expected.sum(1), expected.sum(0)])):
        total = Total(weight, factored)
        total.add([use for use, _ in parts], B)
        for found, wanted in zip(total.sums, sums, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_factors_are_means_of_the_diagonal() -> None:
    """Each expert of a fused matrix has its own; what has one dimension is kept whole."""
    model, rows = shaken("Mixtral"), examples()
    weights = dict(model.named_parameters())
    diagonal = fisher(model, rows, weights, seed=3)
    factored = fisher(model, rows, weights, seed=3, factored=True)
    for name, whole in diagonal.items():
        found = factored[name]
        assert isinstance(whole, Tensor)
        if whole.ndim == 1:
            torch.testing.assert_close(found, whole)
            continue
        assert isinstance(found, Factored)
        rank_one = (
            whole.mean(-1, keepdim=True) * whole.mean(-2, keepdim=True) / whole.mean((-2, -1), True)
        )
        expected = rank_one.nan_to_num()  # an expert no token visited
        torch.testing.assert_close(
            found.dense(), expected, rtol=1e-3, atol=1e-6 * float(expected.max())
        )
    assert size(diagonal) == sum(4 * p.numel() for p in model.parameters())
    vectors = sum(
        p.numel() if p.ndim == 1 else p[..., 0].numel() + p[..., 0, :].numel()
        for p in model.parameters()
    )
    assert size(factored) == 4 * vectors


def test_weights_modes_and_gradients_are_left_alone() -> None:
    model: Any = tiny.tiny("Llama").train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fisher(model, examples(), {"q": model.model.layers[0].self_attn.q_proj.weight})
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_to_score_and_strange_weights_are_errors() -> None:
    model = tiny.tiny("Llama")
    with pytest.raises(ValueError, match="no row"):
        fisher(model, [Example([1, 2], [True, False])], {})
    with pytest.raises(ValueError, match="not a parameter"):
        fisher(model, examples(), {"w": nn.Parameter(torch.zeros(2, 2))})
    with pytest.raises(RequestError, match="quantised"):
        Total(torch.zeros(4, 4, dtype=torch.uint8), False)


class Mixed(nn.Linear):
    """A matrix that is given positions of all rows in one heap."""

    def __call__(self, hidden: Tensor) -> Any:
        B, T, H = hidden.shape
        heap = torch.cat([hidden.reshape(B * T, H), hidden.new_zeros(1, H)])
        return super().__call__(heap)[:-1].view(B, T, -1)


def test_rows_that_meet_in_a_module_are_refused_in_one_line() -> None:
    model: Any = tiny.tiny("Llama")
    old = model.model.layers[0].mlp.gate_proj
    model.model.layers[0].mlp.gate_proj = Mixed(old.in_features, old.out_features, bias=False)
    weights = {"w": model.model.layers[0].mlp.gate_proj.weight}
    with pytest.raises(RequestError, match=r"Mixed mixes rows of text.*l2_sp") as caught:
        fisher(model, examples(), weights)
    assert len(caught.value.problems) == 1


def test_what_was_made_is_read_back_and_only_for_the_same_settings(tmp_path: Path) -> None:
    file, calls = tmp_path / "data" / "fisher.safetensors", []
    made: dict[str, Importance] = {
        "a.weight": torch.rand(3, 2),
        "b": Factored(torch.rand(4), torch.rand(5)),
    }

    def make() -> dict[str, Importance]:
        calls.append(1)
        return made

    for settings_, times in (({"n": 1}, 1), ({"n": 1}, 1), ({"n": 2}, 2), ({"n": 1}, 3)):
        found = kept(file, settings_, CPU, make)
        assert len(calls) == times
        assert found.keys() == made.keys()
        assert all(torch.equal(dense(found[name]), dense(made[name])) for name in made)
    assert [path.name for path in file.parent.iterdir()] == ["fisher.safetensors"]
    with safe_open(file, "pt") as opened:
        assert sorted(opened.keys()) == ["columns/b", "diagonal/a.weight", "rows/b"]
    file.write_bytes(file.read_bytes()[:40])  # cut short
    kept(file, {"n": 1}, CPU, make)
    save_file({"diagonal/a": torch.zeros(1)}, file)  # another's
    kept(file, {"n": 1}, CPU, make)
    assert len(calls) == 5


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fisher.safetensors"
    kept(file, {"n": 1}, CPU, lambda: {"a": torch.ones(2)})
    before = file.read_bytes()

    def broken(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("holdfast.fisher.os.replace", broken)
    with pytest.raises(RequestError, match="cannot be written"):
        kept(file, {"n": 2}, CPU, lambda: {"a": torch.ones(3)})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
