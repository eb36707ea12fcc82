"""EWC against F and the change written out, F from one backward pass a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_l2_sp import ELSEWHERE, NO_LOSSES
from tiny_run import llama, shake, tiny_run, tokenizer
from torch import Tensor

import tiny
from holdfast import displacement
from holdfast import fisher as fishers
from holdfast.errors import RequestError
from holdfast.levers import Setup, StepState
from holdfast.levers.adapter import Adapter
from holdfast.levers.ewc import Ewc
from test_fisher import dense, looped

TEXTS = ["the cat sat", "on the mat", "and was fat", "a dog ran", "over it all"]


@pytest.fixture
def old(tmp_path: Path) -> str:
    file = tiny.jsonl(tmp_path / "old.jsonl", [{"text": text} for text in TEXTS])
    return str(file)


def made(folder: Path, model: Any, adapter: Adapter, lever: Ewc, seed: int = 0) -> Setup:
    """As a run does it: rows from the bare base, then the adapter, then the Fisher."""
    setup = Setup(model, tokenizer(), folder / "data", seed, max_length=24)
    assert lever.streams(setup) == ()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        setup.model = adapter.wrap(setup.model)
    lever.prepare(setup)
    return setup


def term(lever: Ewc) -> Tensor:
    (found,) = lever.terms(NO_LOSSES, StepState(0, {}, micro_batches=4), {}).values()
    assert (found.count, found.weight) == (4, lever.weight)
    return found.sum


@pytest.mark.parametrize("kind", ["diagonal", "factored"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", {"method": "none"}),
        ("Llama", {}),
        ("Llama", {"config": {"use_rslora": True, **ELSEWHERE}}),
        ("GPT2", {"target": "all-linear"}),
        ("Mixtral", {}),
        ("Llama", {"method": "loha"}),
    ],
)
def test_it_is_the_quadratic_form_of_what_is_merged(
    tmp_path: Path, name: str, settings: dict[str, Any], kind: Any
) -> None:
    """Half of sum F dW^2 over peft's own product, and its gradient by autograd through it."""
    lever = Ewc(weight=2.0, fisher=kind, rows=4, max_new_tokens=10)
    model: Any = made(tmp_path, tiny.tiny(name, vocab_size=64), Adapter(r=3, **settings), lever)
    model = model.model
    pairs: dict[str, Any] = {}
    for key, change in lever._moved.items():
        if isinstance(change, displacement.Whole):
            pairs[key] = lambda w=change.weight: w
    layers = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): m
        for n, m in reversed(list(model.named_modules()))
        if hasattr(m, "get_delta_weight")
    }
    for key in lever._moved.keys() - pairs.keys():
        owner, _, parameter = key.rpartition(".")
        layer = layers[owner]
        while getattr(layer, "parameter_name", parameter) != parameter:
            layer = layer.base_layer
        pairs[key] = lambda m=layer: m.get_delta_weight("default")
    starts = {key: delta().detach().clone() for key, delta in pairs.items()}
    assert term(lever).item() == 0.0
    shake(model)
    expected = sum(
        0.5 * (dense(lever._fisher[key]) * (delta() - starts[key]).square()).sum()
        for key, delta in pairs.items()
    )
    assert isinstance(expected, Tensor)
    assert term(lever).item() == pytest.approx(expected.item(), rel=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(total, trained, allow_unused=True) for total in (term(lever), expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-9


def test_its_fisher_is_that_of_the_rows_given(tmp_path: Path, old: str) -> None:
    lever = Ewc(weight=1.0, sources=[old], labels="empirical")
    setup = made(tmp_path, llama(), Adapter(r=2), lever)
    assert setup.notes["ewc"]["rows"] == len(TEXTS)
    letters = tokenizer()
    ids = [[62, *letters(text, add_special_tokens=False)["input_ids"], 63] for text in TEXTS]
    assert sorted(row.input_ids for row in lever._rows) == sorted(ids), "whole texts"
    base = llama()
    weights = {n: p for n, p in base.named_parameters() if "mlp" in n}
    expected = looped(base, lever._rows, weights)
    assert lever._fisher.keys() == expected.keys()
    for name, found in lever._fisher.items():
        assert (dense(found) - expected[name]).norm() < 1e-5 * expected[name].norm()


def test_of_many_rows_it_takes_a_few_by_chance(tmp_path: Path, old: str) -> None:
    chosen = []
    for seed in (0, 0, 1, 2):
        lever = Ewc(weight=1.0, sources=[old], rows=2)
        setup = Setup(llama(), tokenizer(), tmp_path / "data", seed, max_length=24)
        lever.streams(setup)
        chosen.append(sorted(row.input_ids for row in lever._rows))
    assert len(chosen[0]) == 2
    assert chosen[0] == chosen[1]
    assert len({json.dumps(rows) for rows in chosen}) > 1


def test_it_is_computed_once_for_the_same_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = fishers.fisher

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(fishers, "fisher", counted)
    plain = {"weight": 1.0, "rows": 4, "max_new_tokens": 10}
    found = []
    for settings, seed, model, times in (
        (plain, 0, 0, 1),
        (plain | {"weight": 2.0}, 0, 0, 1),  # the Fisher does not depend on its weight
        (plain | {"labels": "empirical"}, 0, 0, 2),
        (plain, 0, 0, 3),
        (plain | {"fisher": "factored"}, 0, 0, 4),
        (plain | {"rows": 5}, 0, 0, 5),
        (plain, 1, 0, 6),
        (plain, 0, 1, 7),
    ):
        lever = Ewc(**settings)
        made(tmp_path, llama(model), Adapter(r=2), lever, seed)
        assert len(calls) == times, settings
        found.append(lever._fisher)
    for again in (1, 3):
        for name, value in found[0].items():
            torch.testing.assert_close(dense(found[again][name]), dense(value))
    files = {path.name for path in (tmp_path / "data").iterdir()}
    assert files == {"fisher.safetensors", "fisher_rows.json"}


def test_rows_without_a_token_to_score_are_refused(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    setup = Setup(llama(), tokenizer(), tmp_path / "data", 0, max_length=24)
    with pytest.raises(RequestError, match=r"levers\.ewc\.sources: .*give text rows"):
        Ewc(weight=1.0, sources=[str(file)]).streams(setup)


def test_a_change_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    lever = Ewc(weight=1.0, rows=2, max_new_tokens=6)
    with pytest.raises(RequestError, match=r"levers\.ewc: .*not a matrix added"):
        made(tmp_path, llama(), Adapter(config={"use_dora": True}), lever)
    assert not (tmp_path / "data" / "fisher.safetensors").exists()


def test_a_strong_pull_keeps_the_weights_nearer(tmp_path: Path) -> None:
    """What it holds is what the Fisher weighs: the quadratic form, not the plain distance."""
    found = {}
    for weight in (1e-6, 100.0):
        lever = Ewc(weight=weight, rows=16, max_new_tokens=12)
        trainer = tiny_run([Adapter(r=2), lever], tmp_path / str(weight), steps=6)
        trainer.train()
        found[weight] = term(lever).item()
    assert found[100.0] < 0.3 * found[1e-6]


def test_a_plan_has_no_weights_to_ask(tmp_path: Path) -> None:
    setup = Setup(llama().to("meta"), tokenizer(), tmp_path, 0, max_length=24)
    assert Ewc(weight=1.0).streams(setup) == ()


def test_off(tmp_path: Path) -> None:
    lever, setup = Ewc(), Setup(llama(), tokenizer(), tmp_path / "data", 0, 24)
    assert lever.streams(setup) == ()
    lever.prepare(setup)
    assert lever == Ewc(**Ewc.OFF), "off unless asked for, and nothing is remembered"
    assert lever.terms(NO_LOSSES, StepState(0, {}, 1), {}) == {}
    assert not (tmp_path / "data").exists()
