"""Token gate: each paper's weight on each token of the lesson, against the equation written out.

Expected weights come from the logits of the model run over each row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_run import LESSON, llama, shake, tiny_run, weights

from holdfast import chunks
from holdfast.chunks import DenseBase, TopEntropy
from holdfast.data.example import Example, Role
from holdfast.data.mixture import Stream
from holdfast.divergence import Divergence
from holdfast.errors import HoldfastError, RequestError
from holdfast.head import Head
from holdfast.levers import Lever, Memory, Setup, StepState, TokenLosses
from holdfast.levers.adapter import Adapter
from holdfast.levers.token_gate import FILE, TokenGate
from holdfast.meters import scoring
from holdfast.objective import token_losses as objective_losses
from holdfast.sparse import SparseBase
from holdfast.step import loss_terms, token_losses
from holdfast.trainer import HoldfastTrainer

Weigh = Callable[[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]]
"""(logits of each row's learned tokens, their targets) of the base -> weights."""


def plainly(model: Any, row: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the positions that predict a learned token, and those tokens."""
    ids = torch.tensor([row.input_ids])
    learned = torch.tensor(row.loss_mask)[1:]
    with torch.no_grad():
        return model(ids).logits[0, :-1][learned], ids[0, 1:][learned]


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def stm(logits: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
    perplexity = [nll(*row).exp() for row in zip(logits, targets, strict=True)]
    kept = [(row <= 60.0).float() for row in perplexity]
    return [row * (sum(map(len, kept)) / sum(row.sum() for row in kept)) for row in kept]


def flow(logits: list[torch.Tensor], targets: list[torch.Tensor]) -> list[torch.Tensor]:
    losses = [float(nll(*row).mean()) for row in zip(logits, targets, strict=True)]
    tau = sorted(losses)[(len(losses) - 1) // 2]
    parts = [math.exp(-loss / tau) for loss in losses]
    total = sum(len(row) for row in targets)
    return [
        torch.full((len(row),), part / sum(parts) * total / len(row))
        for part, row in zip(parts, targets, strict=True)
    ]


def terms_of(trainer: HoldfastTrainer, index: int = 0) -> tuple[TokenLosses, dict[str, Any]]:
    mixture = trainer.train_dataset
    batch = mixture[index]
    totals = {role: int((batch["roles"] == role).sum()) for role in Role}
    out = token_losses(trainer.model, batch, trainer.kl_roles, None, levers=trainer.levers)
    state = StepState(0, totals, 1)
    return out, loss_terms(out, state, trainer.levers, trainer.lever_memory)


def rows_read(trainer: HoldfastTrainer) -> list[int]:
    """Row numbers of the lesson in the first step, in the order in which a batch holds them."""
    batch = trainer.train_dataset[0]
    contents = {tuple(row.input_ids): i for i, row in enumerate(LESSON)}
    found, current = [], []
    pairs = zip(batch["input_ids"].flatten(), batch["position_ids"].flatten(), strict=True)
    for token, position in [*pairs, (0, 0)]:
        if position == 0 and current:
            if tuple(current) in contents:
                found.append(contents[tuple(current)])
            current = []
        current.append(int(token))
    return found


@pytest.mark.parametrize(
    ("gate", "weigh"),
    [(TokenGate(method="stm", threshold=60.0), stm), (TokenGate(method="flow"), flow)],
    ids=["stm", "flow"],
)
def test_the_base_weighs_each_token_of_the_lesson(
    gate: TokenGate, weigh: Weigh, tmp_path: Path
) -> None:
    """The base as it was: the adapter has moved since."""
    trainer = tiny_run([Adapter(r=2), gate], tmp_path, steps=1)
    shake(trainer.model)
    base = llama()
    logits, targets = zip(*(plainly(base, row) for row in LESSON), strict=True)
    expected = weigh(list(logits), list(targets))
    out, terms = terms_of(trainer)
    rows = rows_read(trainer)
    assert len(rows) > 3
    weight = torch.cat([expected[row] for row in rows])
    assert weight.unique().numel() > 1
    tuned = torch.cat([nll(*plainly(trainer.model, LESSON[row])) for row in rows])
    torch.testing.assert_close(out.nll, tuned, rtol=1e-4, atol=1e-5)
    assert terms["task"].sum.item() == pytest.approx(float((weight * tuned).sum()), rel=1e-4)
    assert terms["task"].count == len(tuned)


@pytest.mark.parametrize("method", ["stm", "flow"])
def test_over_the_whole_lesson_the_weights_are_those_of_a_mean(method: str, tmp_path: Path) -> None:
    """They average 1 by tokens (stm), or by rows (flow: they sum to 1)."""
    gate = TokenGate(method=method, **({"threshold": 60.0} if method == "stm" else {}))
    tiny_run([gate], tmp_path)
    rows = [weight.double() for weight in gate._rows.values()]
    tokens = sum(map(len, rows))
    means = [weight.mean() * len(weight) / tokens for weight in rows]
    assert len(rows) == len(LESSON)
    assert float(sum(means)) == pytest.approx(1.0)


def test_dft_weighs_a_token_by_its_probability(tmp_path: Path) -> None:
    trainer = tiny_run([TokenGate(method="dft")], tmp_path, steps=1)
    out, terms = terms_of(trainer)
    logits, targets = zip(
        *(plainly(llama(), LESSON[row]) for row in rows_read(trainer)), strict=True
    )
    probability = [
        row.softmax(1).gather(1, target[:, None])[:, 0]
        for row, target in zip(logits, targets, strict=True)
    ]
    weight = torch.cat(probability)
    expected = float((weight * -weight.log()).sum())
    assert terms["task"].sum.item() == pytest.approx(expected, rel=1e-4)
    # d (w NLL) / d NLL is w: no gradient runs through it
    (slope,) = torch.autograd.grad(terms["task"].sum, out.nll)
    torch.testing.assert_close(slope, weight, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "trained head"])
def test_eaft_weighs_a_token_by_the_entropy_over_the_likeliest(
    adapter: bool, tmp_path: Path
) -> None:
    levers = [*([Adapter(r=2)] if adapter else []), TokenGate(method="eaft")]
    trainer = tiny_run(levers, tmp_path, steps=1)
    shake(trainer.model)
    rows = [plainly(trainer.model, LESSON[row]) for row in rows_read(trainer)]
    tuned = torch.cat([nll(*row) for row in rows])
    weight = torch.cat([entropies(logits, 20) for logits, _ in rows]) / math.log(20)
    assert 0 < float(weight.min()) < float(weight.max()) < 1
    out, terms = terms_of(trainer)
    torch.testing.assert_close(out.nll, tuned, rtol=1e-4, atol=1e-5)
    assert terms["task"].sum.item() == pytest.approx(float((weight * tuned).sum()), rel=1e-4)
    # the same, step and all: what the trainer expected beforehand did not come true
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(float((weight * tuned).mean()), rel=1e-4)


def entropies(logits: torch.Tensor, top: int) -> torch.Tensor:
    """Shannon's, of the renormalised probabilities of the likeliest tokens."""
    p = logits.softmax(1).sort(1, descending=True).values[:, :top]
    p = p / p.sum(1, keepdim=True)
    return -(p * p.log()).sum(1)


@pytest.mark.parametrize("method", ["eaft", "dft"])
def test_a_weight_known_only_after_the_pass_moves_the_weights_as_autograd_does(
    method: str, tmp_path: Path
) -> None:
    """One step of full fine-tuning, against the loss built from the model's own logits."""
    model = llama()
    trainer = tiny_run([TokenGate(method=method)], tmp_path, model=model, steps=1)
    expected = llama()
    terms = []
    for row in rows_read(trainer):
        ids = torch.tensor([LESSON[row].input_ids])
        learned = torch.tensor(LESSON[row].loss_mask)[1:]
        logits, targets = expected(ids).logits[0, :-1][learned], ids[0, 1:][learned]
        each = nll(logits, targets)
        weight = entropies(logits, 20) / math.log(20) if method == "eaft" else (-each).exp()
        terms.append(weight.detach() * each)
    torch.cat(terms).mean().backward()
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: seen.update({name: grad.clone()}))
    trainer.train()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["no base", "dense", "sparse"])
@pytest.mark.parametrize("weights_given", [False, True])
def test_the_entropy_is_taken_from_the_pass_whatever_its_path(
    kind: str, weights_given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of few rows, with a soft-capped head; the losses are those without asking."""
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 4 * 50 * 3)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    hidden = draw(16, 8).requires_grad_()
    head = Head(draw(50, 8), cap=4.0)
    targets = torch.randint(50, (16,), generator=generator)
    places = torch.arange(16)
    wants_nll, wants_kl = places % 3 > 0, (places % 2 > 0) & (kind != "no base")
    at = wants_kl.nonzero().squeeze(1)
    bases: dict[str, Any] = {
        "no base": None,
        "dense": DenseBase(draw(len(at), 8), head),
        "sparse": SparseBase(
            torch.arange(len(at) + 1),
            targets[at],
            torch.full((len(at),), 0.25).log(),
            torch.full((len(at),), 0.75).log(),
        ),
    }
    counts = int(wants_nll.sum()), int(wants_kl.sum())
    given = [torch.rand(n, generator=generator) if weights_given else None for n in counts]
    run = partial(
        objective_losses,
        hidden,
        head,
        targets,
        nll_N=wants_nll,
        kl_N=wants_kl,
        base=bases[kind],
        divergence=Divergence(),
        nll_weight=given[0],
        kl_weight=given[1],
    )
    asked = TopEntropy(5)
    found, without = run(entropy=asked), run()
    assert all(torch.equal(one, other) for one, other in zip(found, without, strict=True))
    logits = head(hidden.detach())[wants_nll]
    assert asked.nll_N is not None
    assert not asked.nll_N.requires_grad
    torch.testing.assert_close(asked.nll_N, entropies(logits, 5), rtol=1e-5, atol=1e-6)
    before = asked.nll_N.clone()
    sum(part.sum() for part in found).backward()  # type: ignore[union-attr]
    assert torch.equal(asked.nll_N, before)


class Ones(Lever):
    """Weighs each token with 1."""

    def token_weights(self, out: TokenLosses, state: StepState, memory: Memory) -> torch.Tensor:
        return torch.ones_like(out.nll)


def test_weight_one_is_no_gate_bit_for_bit(tmp_path: Path) -> None:
    ended = []
    for name, levers in (("without", []), ("with", [Ones()])):
        trainer = tiny_run(levers, tmp_path / name, micro_batches=2)
        trainer.train()
        ended.append(weights(trainer.model))
    assert all(torch.equal(ended[0][key], ended[1][key]) for key in ended[0])


def test_replay_and_padding_are_not_weighed(tmp_path: Path) -> None:
    """Beside rows to replay, in the same packed rows, every weight is still its own token's."""
    old = [Example([5, 6, 7, 8, 9, 10], [False] + [True] * 5) for _ in range(4)]
    streams = [Stream.of("replay", Role.REPLAY, 0.3, old)]
    gate = TokenGate(method="flow")
    trainer = tiny_run([gate], tmp_path, steps=1, streams=streams)
    out, _ = terms_of(trainer)
    weight = gate.token_weights(out, StepState(0, {}, 1), {})
    assert weight is not None
    replayed = out.nll_roles == Role.REPLAY
    assert replayed.any()
    assert bool((weight[replayed] == 1).all())
    assert bool((weight[~replayed] != 1).all())


def test_the_base_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept in the run folder is read back, whatever the model has become."""
    first, second = TokenGate(method="flow"), TokenGate(method="flow")
    tiny_run([first], tmp_path)
    assert (tmp_path / "data" / FILE).is_file()
    monkeypatch.setattr(scoring, "token_nlls", None)
    tiny_run([second], tmp_path, model=llama(seed=1))
    assert first._rows.keys() == second._rows.keys()
    assert all(torch.equal(first._rows[key], second._rows[key]) for key in first._rows)


def test_a_file_of_other_rows_is_not_read(tmp_path: Path) -> None:
    gates = TokenGate(method="flow"), TokenGate(method="flow")
    for gate, rows in zip(gates, (LESSON[:4], LESSON[4:7]), strict=True):
        lesson = [Stream.of("task", Role.TASK, 1.0, rows)]
        gate.prepare(Setup(llama(), None, tmp_path, 0, 24, lesson=lesson))  # type: ignore[arg-type]
    assert [len(gate._rows) for gate in gates] == [4, 3]


def test_a_row_that_was_not_in_the_lesson_is_refused(tmp_path: Path) -> None:
    gate = TokenGate(method="stm", threshold=60.0)
    tiny_run([gate], tmp_path)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "position_ids": torch.tensor([[0, 1, 2]]),
        "roles": torch.tensor([[0, 1, 0]]),
    }
    out = TokenLosses(torch.zeros(1), torch.ones(1), torch.zeros(0), torch.zeros(0), batch)
    with pytest.raises(HoldfastError, match="not there when training began"):
        gate.token_weights(out, StepState(0, {}, 1), {})


def test_a_threshold_that_keeps_nothing_is_refused_with_one_that_works(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"levers\.token_gate\.threshold: .*keeps half") as error:
        tiny_run([TokenGate(method="stm", threshold=1.0)], tmp_path)
    works = float(str(error.value).rsplit(" ", 1)[1])
    tiny_run([TokenGate(method="stm", threshold=works)], tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "flow", "threshold": 2.0},
        {"method": "stm", "top_k": 10},
        {"temperature": 1.0},
        {"method": "eaft", "top_k": 1},
        {"method": "stm", "threshold": 0.5},
        {"method": "focal"},
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TokenGate(**settings)
