"""Context frozen: the full sequence's losses, and a gradient from the decisions alone.

Expected values come from the model run over each whole row; expected gradients from the same, with
the context's part of every layer's keys and values detached by hooks on their projections.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import examples, gpt2, llama, parallel_run, shake, tiny_run, tokenizer
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from holdfast import model as models
from holdfast.data.example import Example, Role
from holdfast.data.packing import MicroBatch, PackedRow, collate
from holdfast.errors import RequestError
from holdfast.levers import Setup
from holdfast.levers.adapter import Adapter
from holdfast.levers.context_frozen import PADDING, ContextFrozen, Document, groups, hidden_states
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.recipe import load_recipe
from holdfast.step import token_losses
from holdfast.trainer import HoldfastTrainer

ON = ContextFrozen(enabled=True)


def mistral() -> MistralForCausalLM:
    """Each layer sees the last 4 positions only."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    config = MistralConfig(**sizes, **heads, max_position_embeddings=64, initializer_range=0.2)
    return MistralForCausalLM(config)


def lora(model: Any) -> Any:
    wrapped = Adapter(r=2, target="all-linear").wrap(model)
    shake(wrapped)
    return wrapped


MODELS = {
    "llama": llama,
    "llama, eager": lambda: llama(attn_implementation="eager"),
    "gpt2": gpt2,
    "mistral": mistral,
    "llama, LoRA": lambda: lora(llama()),
}


def batch_of(*rows: tuple[Role, list[Example]]) -> MicroBatch:
    """Each row's documents end to end, all of one role."""
    return collate(
        [[PackedRow(e.input_ids, e.loss_mask, role) for e in some] for role, some in rows],
        pad_token_id=63,
    )


def mixed_batch() -> MicroBatch:
    """Contexts of many lengths, one of none; anchors in rows of their own."""
    some = [*examples(4, 1, prompt=3), *examples(3, 2, prompt=5), *examples(1, 3, prompt=1)]
    anchors = examples(2, 4, prompt=1)
    return batch_of((Role.TASK, some[:5]), (Role.TASK, some[5:]), (Role.ANCHOR, anchors))


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_whole_rows(name: str) -> None:
    model, batch = MODELS[name](), mixed_batch()
    whole = token_losses(model, batch, frozenset(), None)
    frozen = token_losses(model, batch, frozenset(), None, levers=[ON])
    assert len(whole.nll) > 50
    assert torch.equal(frozen.nll_roles, whole.nll_roles)
    torch.testing.assert_close(frozen.nll, whole.nll, rtol=0, atol=1e-5)


@contextmanager
def detached_context(model: torch.nn.Module, frozen_BW: torch.Tensor) -> Iterator[None]:
    """Keys and values at the frozen positions take no gradient, in a forward over whole rows."""

    def cut(_module: Any, _given: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.where(frozen_BW.unsqueeze(2), out.detach(), out)

    with ExitStack() as stack:
        layers = [m for n, m in model.named_modules() if n.endswith(("k_proj", "v_proj"))]
        assert len(layers) == 4  # two layers
        for layer in layers:
            stack.callback(layer.register_forward_hook(cut).remove)
        yield


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def contexts(batch: MicroBatch) -> torch.Tensor:
    """Positions (B, W) before the first that has a role, in their document of a lesson row."""
    frozen_BW = torch.zeros_like(batch["roles"], dtype=torch.bool)
    for b, (positions, roles) in enumerate(
        zip(batch["position_ids"].tolist(), batch["roles"].tolist(), strict=True)
    ):
        for i in range(len(roles)):
            first = i - positions[i]
            frozen_BW[b, i] = Role.TASK in roles and not any(roles[first : i + 1])
    return frozen_BW


@pytest.mark.parametrize("name", ["llama", "mistral", "llama, LoRA"])
def test_gradient_is_that_of_whole_rows_with_the_contexts_keys_and_values_held(name: str) -> None:
    model, batch = MODELS[name](), mixed_batch()
    with detached_context(model, contexts(batch)):
        token_losses(model, batch, frozenset(), None).nll.sum().backward()
        expected = gradients(model)
    token_losses(model, batch, frozenset(), None, levers=[ON]).nll.sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-4, msg=key)
    token_losses(model, batch, frozenset(), None).nll.sum().backward()
    whole = gradients(model)
    assert any(not torch.allclose(whole[key], found[key], rtol=1e-2) for key in found)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(2, 9), st.integers(1, 9), st.sampled_from([1, 1, 2, 3])),
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_micro_batch_reads_as_it_does_whole(rows: list[list[tuple[int, int, int]]]) -> None:
    """Documents of any length and role, in any row; rows without any; every learned position."""
    model = SMALL
    numbers = iter(range(10**6))
    bins = [
        [
            PackedRow(
                [next(numbers) * 7919 % 62 for _ in range(n)],
                [place >= min(prompt, n - 1) for place in range(n)],
                Role(role),
            )
            for n, prompt, role in documents
        ]
        for documents in rows
    ]
    batch = collate(bins, pad_token_id=63)
    with torch.no_grad():
        whole = models.hidden_states(model, batch["input_ids"], batch["position_ids"])
        ours = hidden_states(model, batch)
    learned = batch["roles"] > 0
    assert ours.shape == whole.shape
    torch.testing.assert_close(ours[learned], whole[learned], rtol=0, atol=1e-5)


SMALL = llama()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=30))
def test_every_document_is_in_one_group_with_little_padding(
    lengths: list[tuple[int, int]],
) -> None:
    found = [Document(i, 0, c, c + d) for i, (c, d) in enumerate(lengths)]
    grouped = groups(iter(found))
    assert sorted(d for group in grouped for d in group) == found
    for group in grouped:
        cells = [
            len(group) * max(d.context for d in group),
            len(group) * max(d.decision for d in group),
        ]
        tokens = [sum(d.context for d in group), sum(d.decision for d in group)]
        assert all(cell <= PADDING * n for cell, n in zip(cells, tokens, strict=True))


def test_only_decisions_are_run_with_gradient() -> None:
    """Counted where they enter the first layer."""
    model, batch = llama(), mixed_batch()
    seen = {True: 0, False: 0}

    def count(_module: Any, given: Any, _out: Any) -> None:
        seen[torch.is_grad_enabled()] += given[0].shape[:2].numel()

    model.model.layers[0].mlp.register_forward_hook(count)
    task = {name: value[:1] for name, value in batch.items()}
    hidden_states(model, task)
    decisions, context = int((task["roles"] > 0).sum()), int(contexts(task).sum())
    assert decisions <= seen[True] <= PADDING * decisions
    assert 0 < seen[False] <= PADDING * context


def test_gradients_survive_autocast() -> None:
    """Weights that autocast casts without gradient must not be used again with one."""
    model, batch = llama(), mixed_batch()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model, batch)
    hidden.float().square().sum().backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "proj" in n)


def run(folder: Path, *chosen: Any, model: Any = None) -> HoldfastTrainer:
    anchor = KlAnchor(weight=2.0, self_generated={"rows": 8, "max_new_tokens": 12})
    trainer = tiny_run([Adapter(r=2), *chosen, anchor], folder, model=model, steps=2)
    trainer.train()
    return trainer


def test_in_a_run_the_anchors_stand_and_the_first_loss_is_the_same(tmp_path: Path) -> None:
    plain, frozen = run(tmp_path / "plain"), run(tmp_path / "frozen", ON)
    first = [trainer.state.log_history[0] for trainer in (plain, frozen)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
    assert first[1]["grad_norm"] != pytest.approx(first[0]["grad_norm"], rel=1e-3)
    batch = plain.train_dataset[0]
    shake(plain.model)
    kl = [
        token_losses(plain.model, batch, plain.kl_roles, plain.reference, levers=levers).kl
        for levers in ([], [ON])
    ]
    assert len(kl[0]) > 10
    torch.testing.assert_close(kl[1], kl[0], rtol=0, atol=1e-5)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Over gloo, under DDP: each process has its own number of groups; beside a token gate."""
    script = Path(__file__).parent / "two_processes.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    more = json.dumps({"context_frozen": {"enabled": True}, "token_gate": {"method": "flow"}})
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path), more],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parallel = torch.load(tmp_path / "outcome.pt")
    alone = parallel_run(tmp_path / "alone", accumulation=4, more=[more])
    assert (parallel["processes"], alone["processes"]) == (2, 1)
    assert parallel["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    torch.testing.assert_close(parallel["weights"], alone["weights"], rtol=0, atol=1e-5)


def test_the_kl_of_lesson_rows_is_the_same(tmp_path: Path) -> None:
    """The base sees whole rows, the tuned model its decisions; positions agree."""
    trainer = tiny_run([Adapter(r=2), KlAnchor(weight=1.0, on="task")], tmp_path, steps=1)
    shake(trainer.model)
    kl = [
        token_losses(
            trainer.model, trainer.train_dataset[0], trainer.kl_roles, trainer.reference, levers=on
        ).kl
        for on in ([], [ON])
    ]
    assert kl[0].min() > 0
    torch.testing.assert_close(kl[1], kl[0], rtol=0, atol=1e-5)


def test_a_state_space_model_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    setup = Setup(MambaForCausalLM(MambaConfig(**sizes)), tokenizer(), tmp_path, 0, 24)
    with pytest.raises(RequestError, match=r"MambaForCausalLM .*enabled: false$") as error:
        ON.prepare(setup)
    assert len(error.value.problems) == 1
    ContextFrozen().prepare(setup)  # turned off it asks for nothing


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_keys_and_values_is_taken(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    ON.prepare(Setup(model, tokenizer(), tmp_path, 0, 24))
    assert model.training is MODELS[name]().training


def test_activation_checkpointing_is_refused_before_and_in_a_step() -> None:
    words = ["levers.context_frozen.enabled=true", "train.activation_checkpointing=true"]
    with pytest.raises(RequestError, match="activation_checkpointing: false"):
        load_recipe(None, words, model="m", data="d.jsonl")
    model = llama().train()
    for layer in model.model.layers:  # what gradient_checkpointing_enable does, by whatever name
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    with pytest.raises(RequestError, match="activation_checkpointing: false"):
        hidden_states(model, mixed_batch())
