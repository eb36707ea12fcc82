"""KL on a part of the steps or rows: the same on average, paid for only where it is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from tiny_run import llama, shake, tiny_run, weights

from holdfast import model as models
from holdfast.data.example import Role
from holdfast.levers import StepState, TokenLosses
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.step import kl_rows, token_losses
from holdfast.trainer import HoldfastTrainer

FEW = {"rows": 8, "max_new_tokens": 12}
NONE = torch.zeros(0)


def anchored(folder: Path, **settings: Any) -> HoldfastTrainer:
    names = ("steps", "arguments", "batch_tokens")
    run = {name: settings.pop(name) for name in names if name in settings}
    anchor = KlAnchor(weight=2.0, self_generated=FEW, **settings)
    return tiny_run([anchor], folder, **{"steps": 1, "batch_tokens": 160, **run})


def state(step: int = 0, seed: int = 0) -> StepState:
    return StepState(step, dict.fromkeys(Role, 10), 1, seed)


def gradient(trainer: HoldfastTrainer) -> list[torch.Tensor]:
    """Of the anchor's terms in the first step, by weight; 0 where there is no term."""
    batch = trainer.train_dataset[0]
    totals = {role: int((batch["roles"] == role).sum()) for role in Role}
    now = StepState(0, totals, 1)
    kl_B = kl_rows(trainer.levers, batch["input_ids"], now)
    out = token_losses(trainer.model, batch, trainer.kl_roles, trainer.reference, kl_B=kl_B)
    loss = out.kl.sum() * 0
    for term in trainer.levers[0].terms(out, now, {}).values():
        loss = loss + term.weight * term.sum / term.count
    return list(torch.autograd.grad(loss, [*trainer.model.parameters()], materialize_grads=True))


@pytest.mark.parametrize("share_of", ["steps", "rows"])
@pytest.mark.parametrize("on", ["anchor", "both"])
def test_the_expected_gradient_is_that_without_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_of: str, on: str
) -> None:
    """Averaged over every outcome of all coins, each with its probability."""
    whole = anchored(tmp_path, on=on, batch_tokens=64)
    shake(whole.model)
    trainer = anchored(tmp_path, on=on, batch_tokens=64, share=0.3, share_of=share_of)
    shake(trainer.model)
    coins = dict.fromkeys(_keys(trainer), True)
    monkeypatch.setattr(KlAnchor, "_taken", lambda _self, _state, *row: coins[row])
    roles = trainer.train_dataset[0]["roles"]
    assert len(coins) == (1 if share_of == "steps" else len(roles))
    expected = gradient(whole)
    mean = [torch.zeros_like(g) for g in expected]
    for outcome in product((True, False), repeat=len(coins)):
        coins.update(zip(coins, outcome, strict=True))
        chance = 0.3 ** sum(outcome) * 0.7 ** (len(outcome) - sum(outcome))
        for total, part in zip(mean, gradient(trainer), strict=True):
            total += chance * part
    for ours, plain in zip(mean, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in expected) > 1e-2


def _keys(trainer: HoldfastTrainer) -> list[tuple[int, ...]]:
    """What names each coin of the first micro-batch, as the lever asks for it."""
    anchor, asked = trainer.levers[0], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KlAnchor, "_taken", lambda _s, _state, *row: asked.append(row) or True)
        anchor.kl_rows(trainer.train_dataset[0]["input_ids"], state())
    return list(dict.fromkeys(asked))


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_coins_fall_as_often_as_they_should(share: float) -> None:
    """Binomial, exact test; rows of one step by themselves, steps by themselves, and together."""
    ids = torch.arange(48).view(2, 24)
    steps, rows = (KlAnchor(share=share, share_of=of) for of in ("steps", "rows"))
    taken = torch.stack([rows.kl_rows(ids, state(step, seed=3)) for step in range(1500)])
    whole = [bool(steps.kl_rows(ids, state(step))[0]) for step in range(1500)]
    for hits, chance in (
        (int(taken[:, 0].sum()), share),
        (int(taken[:, 1].sum()), share),
        (int(taken.all(1).sum()), share**2),
        (sum(whole), share),
    ):
        assert binomtest(hits, 1500, chance).pvalue > 1e-3


def test_a_coin_knows_seed_step_and_row_alone() -> None:
    ids = torch.randint(0, 60, (64, 16), generator=torch.Generator().manual_seed(0))
    rows = KlAnchor(share=0.5, share_of="rows")
    first = rows.kl_rows(ids, state())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows.kl_rows(ids[order], state()), first[order])
    assert torch.equal(rows.kl_rows(ids[:5], state()), first[:5])
    for other in (state(step=1), state(seed=1)):
        assert not torch.equal(rows.kl_rows(ids, other), first)
    steps = KlAnchor(share=0.5)
    several = [tuple(steps.kl_rows(ids, state(step)).tolist()) for step in range(20)]
    assert {len(set(one)) for one in several} == {1}
    assert len(set(several)) == 2


def test_a_step_left_out_has_no_term_and_one_that_is_not_counts_more() -> None:
    out = TokenLosses(NONE, NONE, torch.tensor([1.0, 2.0]), torch.tensor([Role.ANCHOR] * 2))
    anchor = KlAnchor(weight=3.0, share=0.25)
    found = [anchor.terms(out, state(step), {}) for step in range(20)]
    taken = [bool(anchor.kl_rows(torch.zeros(1, 8), state(step))) for step in range(20)]
    assert [bool(one) for one in found] == taken
    assert len(set(taken)) == 2
    (term,) = found[taken.index(True)].values()
    assert (float(term.sum), term.count, term.weight) == (3.0 / 0.25, 10, 3.0)


class Watched:
    """The reference of a trainer; for each call the step, and how many rows it was asked for."""

    def __init__(self, trainer: HoldfastTrainer) -> None:
        self.trainer, self.reference = trainer, trainer.reference
        self.asked: list[tuple[int, int]] = []
        trainer.reference = self

    def view(self, ids: torch.Tensor, positions: torch.Tensor, kl: torch.Tensor) -> Any:
        self.asked.append((self.trainer.state.global_step, int(kl.any(1).sum())))
        return self.reference.view(ids, positions, kl)


@pytest.mark.parametrize("on", ["anchor", "both"])
def test_the_base_is_asked_only_in_the_steps_that_are_taken(tmp_path: Path, on: str) -> None:
    trainer = anchored(tmp_path, on=on, share=0.4, steps=12)
    watched, seed = Watched(trainer), trainer.args.seed
    taken = [step for step in range(12) if trainer.levers[0]._taken(state(step, seed))]
    trainer.train()
    assert [step for step, _ in watched.asked] == taken
    assert 0 < len(taken) < 12


def test_rows_that_are_not_taken_pass_neither_the_base_nor_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = anchored(tmp_path, share=0.5, share_of="rows", steps=6)
    anchor, batches = trainer.levers[0], [trainer.train_dataset[i] for i in range(6)]
    watched = Watched(trainer)
    passed: list[int] = []
    plain = models.hidden_states

    def counted(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if model is trainer.model:
            passed.append(len(ids))
        return plain(model, ids, positions)

    monkeypatch.setattr("holdfast.step.models.hidden_states", counted)
    trainer.train()
    taken, through = [], []
    for step, batch in enumerate(batches):
        anchors = (batch["roles"] == Role.ANCHOR).any(1)
        kept = anchor.kl_rows(batch["input_ids"], state(step, trainer.args.seed)) & anchors
        taken.append(int(kept.sum()))
        lesson = (batch["roles"] == Role.TASK).any(1)
        through.append(int((lesson | kept).sum()))
    assert passed == through
    assert watched.asked == [(step, n) for step, n in enumerate(taken) if n]
    assert min(taken) < max(int((b["roles"] == Role.ANCHOR).any(1).sum()) for b in batches)


def test_the_plan_counts_a_share_of_the_passes(
    here: Path, quick: list[str], holdfast: Callable[..., Any]
) -> None:
    words = ["model=tiny", "data=lesson.jsonl", *quick, "--dry-run", "--json"]
    words += ["levers.kl_anchor.reference=adapter_off"]
    plain, part = (
        json.loads(holdfast("train", *words, *more).out)["plan"]["reference"]
        for more in ([], ["levers.kl_anchor.share=0.2"])
    )
    for name in ("forward_share", "step_share"):
        assert part[name] == pytest.approx(0.2 * plain[name])


@pytest.mark.parametrize("share_of", ["steps", "rows"])
def test_resumed_it_ends_where_an_uninterrupted_run_ends(tmp_path: Path, share_of: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    settings = {"share": 0.5, "share_of": share_of, "steps": 6, "arguments": saving}
    whole, resumed = (anchored(tmp_path, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-3"))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = anchored(tmp_path, steps=6)
    plain.train()
    assert any(not torch.equal(weights(plain.model)[name], theirs[name]) for name in theirs)
    start = weights(llama())
    assert any(not torch.equal(start[name], theirs[name]) for name in theirs)
