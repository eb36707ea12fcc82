"""The plan against the run it speaks of: parameters, steps and tokens exactly, memory roughly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import MambaConfig, MambaForCausalLM

import tiny
from holdfast import model as models
from holdfast.chunks import CPU_CHUNK_ROWS
from holdfast.plan import generated, memory, plan, skeleton
from holdfast.recipe import Recipe, load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

WAYS = {
    "mlp": [],
    "all": ["levers.adapter.target=all-linear", "levers.adapter.r=4"],
    "full": ["levers.adapter=none"],
}


Asked = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for a CPU, whatever this machine has, or for what the test asks for."""
    there = getattr(request, "param", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


@pytest.fixture
def recipe(here: Path, quick: list[str]) -> Asked:
    """A recipe for the tiny model and lesson, with further words."""
    return lambda *words: load_recipe(words=[*quick, *words], model="tiny", data="lesson.jsonl")


def loaded(asked: Recipe) -> Any:
    """The model as a run would train it."""
    tokenizer = models.load_tokenizer(asked.model)
    adapter = not asked.levers.adapter.off
    model = models.load_model(asked.model, adapter=adapter, tokenizer=tokenizer)
    return asked.levers.adapter.wrap(model)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_are_those_of_the_loaded_model(way: str, recipe: Asked) -> None:
    asked = recipe(*WAYS[way])
    found, model = plan(asked), loaded(asked)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_steps_and_tokens_are_those_of_the_run(here: Path, recipe: Asked) -> None:
    (here / "old.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 20)
    asked = recipe("train.steps=7", "levers.replay.sources=[old.jsonl]")
    found = plan(asked)
    prepared = generated(asked, here / "data", Console(quiet=True))
    assert found.steps == prepared.steps == 7
    assert found.batch_tokens == prepared.mixture.batch_tokens == 128
    assert found.micro_batches == prepared.mixture.micro_batches
    budget = prepared.mixture.token_budget(7)
    planned = {stream.name: stream for stream in found.streams}
    assert set(planned) == set(budget)
    for name in ("task", "replay/old"):
        assert planned[name].tokens == budget[name]["tokens"]
        assert planned[name].rows == budget[name]["rows"]
    unwritten = planned["self_generated"]
    assert (unwritten.rows, unwritten.share) == (None, 0.5)
    assert abs(unwritten.tokens - budget["self_generated"]["tokens"]) <= 2 * 9, "to within a row"


def test_steps_from_epochs_are_those_of_the_run(here: Path, recipe: Asked) -> None:
    asked = recipe("train.steps=null", "train.epochs=1.5")
    assert plan(asked).steps == generated(asked, here / "data", Console(quiet=True)).steps > 2


def kept_by_autograd(model: Any, rows: int, width: int) -> int:
    """Bytes of the tensors that a forward pass saves for backward, but for weights, each once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(rows, width, dtype=torch.long)
    positions = torch.arange(width // 2).repeat(2).expand(rows, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        models.hidden_states(model.train(), ids, positions)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_activations_are_what_autograd_keeps(way: str, dtype: str, recipe: Asked) -> None:
    words = [f"model.dtype={dtype}", "train.micro_batch_tokens=256"]
    asked = recipe(*WAYS[way], *words)
    model = loaded(asked)
    estimate = memory(asked, model, max_length=128)["activations"]
    assert 0.95 < estimate / kept_by_autograd(model, rows=2, width=128) < 1.4


def test_activation_checkpointing_keeps_less(recipe: Asked) -> None:
    asked = [recipe(f"train.activation_checkpointing={on}") for on in ("false", "true")]
    every, few = (plan(one).memory["activations"] for one in asked)
    assert few < 0.6 * every


def test_memory_adds_up(recipe: Asked) -> None:
    """By hand: the tiny model has 36,064 weights of 4 bytes, all of them trained."""
    asked = recipe("levers.adapter=none", "train.micro_batch_tokens=256")
    found = plan(asked)
    size = 4 * found.parameters
    assert found.parameters == 273 * 32 * 2 + 32 + 2 * (32 * (32 + 2 * 16 + 32) + 3 * 32 * 64 + 64)
    assert {part: found.memory[part] for part in ("weights", "reference", "gradients")} == {
        "weights": size,
        "reference": 4 * 273 * 32,  # of the base, which is remembered, only the head
        "gradients": size,
    }
    assert found.memory["optimizer"] == 2 * size
    assert found.memory["casts"] == 0, "on a CPU nothing is cast"
    logits, base, gradient = 4 * 256 * 273, 4 * 256 * 273, 4 * 273 * 32
    assert found.memory["logits"] == logits + base + gradient
    assert CPU_CHUNK_ROWS // 2 >= 256, "all of them are one chunk"
    assert found.total_memory == sum(found.memory.values())


def test_logits_are_one_chunk_and_another_for_a_live_base(recipe: Asked) -> None:
    """By hand; with an adapter no gradient of the head is kept."""
    chunk = 4 * 256 * 273
    for words, chunks in (([], 2), (["levers.kl_anchor=none"], 1)):
        found = plan(recipe("train.micro_batch_tokens=256", *words))
        assert found.memory["logits"] == chunks * chunk


def test_no_copy_where_the_adapter_is_switched_off_or_nothing_is_anchored(recipe: Asked) -> None:
    for words in ([], ["levers=none"]):
        found = plan(recipe(*words))
        assert found.memory["reference"] == 0
    assert plan(recipe("levers.kl_anchor.reference=frozen")).memory["reference"] > 0


HALF = "levers.kl_anchor.self_generated.fraction=0.5"
OFF = "levers.kl_anchor.reference=adapter_off"
FULL = "levers.adapter=none"


@pytest.mark.parametrize(("words", "passes"), [([], 2), ([FULL], 3)])
def test_what_is_remembered_is_read_once(words: list[str], passes: int, recipe: Asked) -> None:
    """By hand: the lesson's tokens over its epochs, of all tokens; 32 numbers of 4 bytes each."""
    asked = recipe("levers.kl_anchor.on=both", HALF, "train.steps=40", *words)
    found = plan(asked)
    chosen = found.reference
    assert chosen is not None
    task, anchor = found.streams
    assert task.epochs is not None
    assert task.epochs > 2
    once = task.tokens / task.epochs + anchor.tokens  # of text not yet written at most that much
    assert (chosen.source, chosen.bytes) == ("remembered", int(once) * 32 * 4)
    assert chosen.forward_share == pytest.approx(once / (task.tokens + anchor.tokens))
    assert chosen.step_share == pytest.approx(chosen.forward_share / passes)
    assert found.memory["reference"] == (4 * 273 * 32 if words else 0)
    cost = chosen.lines()[1]
    assert "each text once before training, about" in cost
    assert f"{chosen.step_share:.0%} of the steps' time" in cost


@pytest.mark.parametrize(
    ("words", "source", "copied", "device", "share", "step"),
    # by hand: of 2 passes a step under an adapter, 3 in full, one more with recomputed activations
    [
        ([HALF, OFF], "adapter_off", 0.0, "beside the model", 0.5, 0.25),
        ([HALF, FULL, "levers.kl_anchor.reference=frozen"], "frozen", 1.0, "", 0.5, 0.5 / 3),
        (["levers.kl_anchor.on=task", HALF, OFF], "adapter_off", 0.0, "", 1.0, 0.5),
        (["levers.kl_anchor.on=both", HALF, OFF], "adapter_off", 0.0, "", 1.0, 0.5),
        ([HALF, OFF, "train.activation_checkpointing=true"], "adapter_off", 0.0, "", 0.5, 0.5 / 3),
        (
            [HALF, "levers.kl_anchor.share=0.5"],
            *("adapter_off", 0.0, "beside the model", 0.25, 0.125),
        ),
        (
            [HALF, "levers.adapter=none", "levers.kl_anchor.reference_dtype=bfloat16"],
            *("frozen", 0.5, "beside the model", 0.5, 0.5 / 3),
        ),
        (
            [HALF, "levers.adapter=none", "levers.kl_anchor.reference_device=offload"],
            *("frozen", 1.0, "offload", 0.5, 0.5 / 3),
        ),
        (
            [HALF, "levers.adapter=none", "levers.kl_anchor.reference=./tiny"],
            *("stage", 1.0, "beside the model", 0.5, 0.5 / 3),
        ),
    ],
)
def test_the_reference_with_its_reason_and_cost(
    words: list[str],
    source: str,
    copied: float,
    device: str,
    share: float,
    step: float,
    recipe: Asked,
) -> None:
    found = plan(recipe(*words))
    chosen = found.reference
    assert chosen is not None
    weights = 4 * 36_064
    assert (chosen.source, chosen.bytes) == (source, copied * weights)
    assert device in chosen.device
    assert chosen.forward_share == share
    assert chosen.step_share == pytest.approx(step)
    beside = chosen.device == "beside the model"
    assert found.memory["reference"] == (chosen.bytes if beside else 0)
    first, cost = chosen.lines()
    assert first == f"{source}: {chosen.why}"
    assert f"{share:.0%} of the tokens, about {step:.0%} of a step" in cost


def test_nothing_anchored_no_reference(recipe: Asked) -> None:
    assert plan(recipe("levers.kl_anchor=none")).reference is None


def test_a_dry_run_prints_choice_reason_and_cost(
    here: Path, quick: list[str], holdfast: Any
) -> None:
    command = ["train", "--model=tiny", "--data=lesson.jsonl", "--out=run", "--dry-run", *quick]
    said = " ".join(holdfast(*command).out.replace("│", " ").split())
    assert "remembered: the texts are known" in said
    assert "of memory beside the model; each text once before training, about" in said
    assert not (here / "run").exists()


def test_a_model_without_attention_has_a_plan(here: Path, holdfast: Any, quick: list[str]) -> None:
    bare = MambaForCausalLM(
        MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2)
    )
    tiny.save(here / "mamba", bare, tiny.letters())
    words = ["--model", "mamba", "--data", "lesson.jsonl", *quick, "levers.adapter.method=none"]
    done = holdfast("train", "--dry-run", *words)
    assert done.code == 0, done.err


def test_a_skeleton_holds_no_weights(recipe: Asked) -> None:
    assert {p.device.type for p in skeleton(recipe()).parameters()} == {"meta"}


@pytest.mark.parametrize("accelerator", [True], indirect=True)
def test_on_an_accelerator_work_is_in_bfloat16(accelerator: None, recipe: Asked) -> None:
    full, lora = plan(recipe("levers.adapter=none")), plan(recipe())
    assert full.memory["weights"] == 4 * full.parameters
    assert full.memory["casts"] == 2 * full.parameters
    assert lora.memory["weights"] == 2 * full.parameters + 4 * lora.trainable


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=150"], "2 times the base's loss on the canary in nats; 1 to 20"),
        (["train.steps=150", "levers.kl_anchor.weight=3"], "3 "),
    ],
)
def test_a_dry_run_says_what_the_anchor_weighs(
    words: list[str], said: str, here: Path, quick: list[str], holdfast: Any
) -> None:
    command = ["train", "--model=tiny", "--data=lesson.jsonl", "--out=run", "--dry-run", *quick]
    printed = " ".join(holdfast(*command, *words).out.replace("│", " ").split())
    assert f"anchor weight {said}" in printed
    assert ("times the base's loss" in printed) is ("weight=3" not in words[-1])
