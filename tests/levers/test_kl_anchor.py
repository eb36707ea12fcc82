"""The KL anchor: nothing at zero drift, the base's own view ever after."""

from __future__ import annotations

import copy
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_run import llama, shake, tiny_run, tokenizer

from holdfast import model as models
from holdfast.data.example import Role
from holdfast.errors import RequestError
from holdfast.levers import Setup, StepState, Term, TokenLosses
from holdfast.levers.adapter import Adapter
from holdfast.levers.kl_anchor import KlAnchor
from holdfast.meters import Reading
from holdfast.objective import DenseBase
from holdfast.reference.adapter_off import AdapterOff
from holdfast.reference.frozen import Frozen
from holdfast.reference.remembered import Remembered
from holdfast.step import token_losses
from holdfast.trainer import HoldfastTrainer

FEW = {"rows": 8, "max_new_tokens": 12}


def anchored(folder: Path, method: str, **settings: Any) -> HoldfastTrainer:
    config = settings.pop("config", {})
    known = settings.pop("known", False)
    anchor = KlAnchor(weight=2.0, self_generated=FEW, **settings)
    levers = [Adapter(method=method, r=2, config=config), anchor]
    return tiny_run(levers, folder, steps=1, known=known)


def terms(trainer: HoldfastTrainer) -> dict[str, Term]:
    """The anchor's terms in the first step, which has one micro-batch."""
    batch = trainer.train_dataset[0]
    totals = {role: int((batch["roles"] == role).sum()) for role in Role}
    out = token_losses(trainer.model, batch, trainer.kl_roles, trainer.reference)
    found: dict[str, Term] = trainer.levers[1].terms(out, StepState(0, totals, 1), {})
    return found


@pytest.mark.parametrize(("method", "largest"), [("lora", 0.0), ("none", 1e-6)])
def test_at_zero_drift_it_neither_costs_nor_pulls(
    tmp_path: Path, method: str, largest: float
) -> None:
    """To the bit where the head is frozen; a trained head's softmax rounds."""
    trainer = anchored(tmp_path, method, on="both")
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for term in terms(trainer).values():
        assert term.count > 10
        assert term.sum.item() == 0.0
    total = sum(term.sum for term in terms(trainer).values())
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) <= largest


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", ["lora", "none"])
@pytest.mark.parametrize(
    ("on", "roles"),
    [("anchor", [Role.ANCHOR]), ("task", [Role.TASK]), ("both", [Role.TASK, Role.ANCHOR])],
)
def test_it_is_the_kl_of_the_base_at_the_positions_asked_for(
    tmp_path: Path, method: str, on: str, roles: list[Role], known: bool
) -> None:
    """Against torch's kl_div over whole logits, the base being a model never touched."""
    trainer = anchored(tmp_path, method, on=on, known=known)
    assert isinstance(trainer.reference, Remembered) is known
    shake(trainer.model)
    batch = trainer.train_dataset[0]
    seen = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        tuned, base = (
            model(**seen, use_cache=False).logits.log_softmax(-1)
            for model in (trainer.model, llama())
        )
    kl = torch.nn.functional.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
    found = terms(trainer)
    assert list(found) == [f"kl_anchor/{role.name.lower()}" for role in roles]
    for role, term in zip(roles, found.values(), strict=True):
        there = batch["roles"] == role
        assert (term.count, term.weight) == (int(there.sum()), 2.0)
        assert term.sum.item() == pytest.approx(kl[there].sum().item(), rel=1e-4)
        assert term.sum.item() > 0.01


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"reference": "adapter_off"}),
        ("lora", {"config": {"modules_to_save": ["lm_head"]}}),
        ("lora", {"reference": "frozen"}),
        ("none", {}),
    ],
)
def test_its_reference_stays_the_base(
    tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    """Whatever is trained, the head included; and training goes on with the adapter in place."""
    trainer = anchored(tmp_path, method, **settings)
    batch, base = trainer.train_dataset[0], llama()
    seen = (batch["input_ids"], batch["position_ids"])
    every = torch.ones_like(seen[0], dtype=torch.bool)

    def logits(model: Any) -> torch.Tensor:
        ids, positions = seen
        out: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return out

    trainer.train()
    shake(trainer.model)
    tuned = logits(copy.deepcopy(trainer.model))
    reference = trainer.reference
    assert reference is not None
    view = reference.view(*seen, every)
    assert isinstance(view, DenseBase)
    assert not view.hidden_MH.requires_grad
    with torch.no_grad():
        expected = logits(base)
        assert torch.equal(view.head(view.hidden_MH), expected.flatten(0, 1))
    assert trainer.model.training
    assert torch.equal(logits(trainer.model), tuned)
    assert (tuned - logits(base)).abs().max() > 1e-2


def setup(folder: Path, model: Any, lesson_tokens: int = 0) -> Setup:
    return Setup(model, tokenizer(), folder, 0, max_length=24, lesson_tokens=lesson_tokens)


def rows(anchor: KlAnchor, made: Setup) -> list[tuple[list[int], list[bool]]]:
    (stream,) = anchor.streams(made)
    assert (stream.role, stream.share) == (Role.ANCHOR, anchor.self_generated.fraction)
    return [(list(ids), list(mask)) for ids, mask in map(stream.fetch, range(len(stream.lengths)))]


def test_its_rows_are_written_by_the_base_once(tmp_path: Path) -> None:
    anchor = KlAnchor(self_generated=FEW)
    first = rows(anchor, setup(tmp_path, llama()))
    assert len(first) == 8
    assert all(ids[0] == 62 and mask == [False] + [True] * (len(ids) - 1) for ids, mask in first)
    assert max(len(ids) for ids, _ in first) <= 13
    assert rows(anchor, setup(tmp_path, None)) == first, "read back without a model"
    assert rows(anchor, setup(tmp_path / "again", llama())) == first, "seeded"
    other = KlAnchor(self_generated=FEW | {"temperature": 2.0})
    assert rows(other, setup(tmp_path, llama())) != first, "other settings, other rows"


@pytest.mark.parametrize(
    ("lesson_tokens", "settings", "count"),
    # half of the tokens is as many as the lesson's: 3000 / 12 a row
    [(3000, {}, 250), (0, {}, 16), (3000, {"max_rows": 40}, 40), (3000, {"rows": 5}, 5)],
)
def test_it_writes_as_many_rows_as_the_run_reads(
    tmp_path: Path, lesson_tokens: int, settings: dict[str, int], count: int
) -> None:
    anchor = KlAnchor(self_generated={"max_new_tokens": 12, **settings})
    assert len(rows(anchor, setup(tmp_path, llama(), lesson_tokens))) == count


def test_a_base_that_does_not_write_as_many_is_told_of(tmp_path: Path) -> None:
    """A row is BOS and one of 64 tokens."""
    made = setup(tmp_path, llama())
    found = rows(KlAnchor(self_generated={"rows": 300, "max_new_tokens": 1}), made)
    assert len(found) <= 64
    note = f"the base writes {len(found)} different rows, 300 were asked for"
    assert made.notes == {"self_generated": note}


def test_what_samples_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    anchor = KlAnchor(self_generated=FEW | {"engine": "vllm"})
    with pytest.raises(RequestError, match="engine: vllm cannot sample the base"):
        rows(anchor, setup(tmp_path, llama()))


def test_off(tmp_path: Path) -> None:
    anchor, made = KlAnchor(**KlAnchor.OFF), setup(tmp_path, None)
    anchor.prepare(made)
    assert made.reference is None
    assert anchor.streams(made) == ()
    assert anchor.kl_roles() == frozenset()


def test_on_the_lesson_alone_it_needs_no_rows(tmp_path: Path) -> None:
    assert KlAnchor(on="task").streams(setup(tmp_path, None)) == ()


@pytest.mark.parametrize(
    ("settings", "adapter", "source", "why"),
    [
        ({}, True, "remembered", "the texts are known"),
        ({}, False, "remembered", "the texts are known"),
        ({"share": 0.5}, True, "adapter_off", "an adapter is trained"),
        ({"share": 0.5}, False, "frozen", "all weights are trained"),
        ({"share": 0.5, "reference": "remembered"}, False, "remembered", "asked for"),
        ({"cache": "here"}, True, "cache", "a cache is given"),
        ({"cache": "here", "reference": "cache"}, False, "cache", "a cache is given"),
        ({"reference": "frozen"}, True, "frozen", "asked for"),
        ({"reference": "adapter_off"}, True, "adapter_off", "asked for"),
        ({"reference_dtype": "int8"}, True, "frozen", "reference_dtype asks"),
        ({"reference_device": "offload"}, True, "frozen", "reference_device asks"),
        ({"reference": "runs/one"}, True, "stage", "runs/one is asked for"),
        ({"reference": "~/one"}, False, "stage", "~/one is asked for"),
    ],
)
def test_which_reference_is_chosen_and_why(
    settings: dict[str, Any], adapter: bool, source: str, why: str
) -> None:
    chosen, said = KlAnchor(**settings).source(adapter)
    assert chosen == source
    assert why in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reference": "frozn"}, "did you mean 'frozen'"),
        ({"reference": "cache"}, "needs cache: the folder"),
        ({"cache": "here", "reference": "frozen"}, "give one of them"),
        ({"cache": "here", "reference_dtype": "int8"}, "reference_dtype is for a second copy"),
        ({"reference": "adapter_off", "reference_device": "cpu"}, "is for a second copy"),
        ({"reference": "remembered", "reference_dtype": "int8"}, "is for a second copy"),
        ({"task_weight": 2.0}, "task_weight is for on: both"),
        ({"on": "task", "task_weight": 2.0}, "task_weight is for on: both"),
        ({"on": "both", "task_weight": 0.0}, "greater than 0"),
        ({"divergence": {"temperature": 0}}, "greater than 0"),
    ],
)
def test_settings_that_contradict_one_another(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        KlAnchor(**settings)


def test_a_stage_is_named_by_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frozn").mkdir()
    assert KlAnchor(reference="frozn").source(True)[0] == "stage"


def test_lesson_and_anchor_positions_have_weights_of_their_own(tmp_path: Path) -> None:
    kl = torch.tensor([1.0, 2.0, 4.0])
    roles = torch.tensor([Role.TASK, Role.ANCHOR, Role.ANCHOR])
    none = torch.zeros(0)
    out = TokenLosses(none, none, kl, roles)
    totals = dict.fromkeys(Role, 0) | {Role.TASK: 5, Role.ANCHOR: 7}
    anchor = KlAnchor(on="both", weight=3.0, task_weight=0.5)
    found = anchor.terms(out, StepState(0, totals, 1), {})
    assert {n: (float(t.sum), t.count, t.weight) for n, t in found.items()} == {
        "kl_anchor/task": (1.0, 5, 0.5),
        "kl_anchor/anchor": (6.0, 7, 3.0),
    }


def test_off_it_is_off_whatever_the_weight_on_the_lesson() -> None:
    anchor = KlAnchor(weight=0.0, on="both", task_weight=1.0)
    totals = dict.fromkeys(Role, 3)
    none = torch.zeros(0)
    assert anchor.kl_roles() == frozenset()
    assert anchor.terms(TokenLosses(none, none, none, none), StepState(0, totals, 1), {}) == {}


def test_where_the_switch_is_not_the_base_auto_takes_a_copy_and_says_so(tmp_path: Path) -> None:
    """PiSSA moves a part of the base into the adapter: without it the base is not whole."""
    adapter = Adapter(method="lora", r=2, config={"init_lora_weights": "pissa"})
    made = setup(tmp_path, adapter.wrap(llama()))
    KlAnchor().prepare(made)
    assert isinstance(made.reference, Frozen)
    assert "frozen: switching the trained adapter off changes" in made.notes["reference"]
    with pytest.raises(RequestError, match=r"'adapter_off' is not the base.*set it to frozen"):
        KlAnchor(reference="adapter_off").prepare(made)


@pytest.mark.parametrize("method", ["lora", "pissa", "none"])
def test_it_remembers_the_start_of_the_stage(tmp_path: Path, method: str) -> None:
    """The hidden states of a model never touched; PiSSA's start is the base to rounding only."""
    config = {"init_lora_weights": "pissa"} if method == "pissa" else {}
    named = "none" if method == "none" else "lora"
    made = setup(tmp_path, Adapter(method=named, r=2, config=config).wrap(llama()))
    text = [5, 9, 11, 30, 2]
    made.texts = lambda roles: [text] if roles == {Role.ANCHOR} else []
    KlAnchor().prepare(made)
    assert isinstance(made.reference, Remembered)
    assert made.notes["reference"] == "remembered: the texts are known"
    shake(made.model)
    ids, positions = torch.tensor([text]), torch.arange(5)[None]
    expected = models.hidden_states(llama(), ids, positions)[0, :-1]
    seen = made.reference.view(ids, positions, torch.tensor([[True] * 4 + [False]]))
    torch.testing.assert_close(seen.hidden_MH, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("environment", "free", "said"),
    [
        ({}, 1000, r"hidden states are 0\.0 GiB, and a quarter of the 0\.0 GiB"),
        ({"WORLD_SIZE": "2"}, 2**40, "several processes train"),
    ],
)
def test_where_it_cannot_remember_auto_asks_a_live_base_and_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    free: int,
    said: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("holdfast.reference.frozen.free_memory", lambda _device: free)
    made = setup(tmp_path, Adapter(method="lora", r=2).wrap(llama()))
    made.texts = lambda _roles: [[1, 2, 3]] * 40
    KlAnchor().prepare(made)
    assert isinstance(made.reference, AdapterOff)
    assert re.search(rf"^adapter_off: an adapter is trained \(.*{said}", made.notes["reference"])
    with pytest.raises(RequestError, match=rf"'remembered' cannot be: .*{said}.*leave it at auto"):
        KlAnchor(reference="remembered").prepare(made)


def test_what_is_not_known_beforehand_cannot_be_remembered(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="texts of the run are not known beforehand"):
        KlAnchor(reference="remembered").prepare(setup(tmp_path, llama()))


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.reference.frozen.free_memory", lambda _device: 1000)
    with pytest.raises(RequestError, match="does not fit"):
        KlAnchor().prepare(setup(tmp_path, llama()))
    KlAnchor(reference="frozen").prepare(setup(tmp_path, llama()))  # asked for by name


def test_a_run_reads_the_cache_that_was_built_for_it(
    here: Path, quick: list[str], holdfast: Any
) -> None:
    """The rows are those of the cache, and a cache of other rows is refused before training."""
    asked = ["--model=tiny", "--data=lesson.jsonl", *quick]
    built = holdfast("cache", "build", *asked, "--out=stored")
    assert built.code == 0, built.err
    cached = "levers.kl_anchor.cache=stored"
    result = holdfast("train", *asked, "--out=run", cached)
    assert result.code == 0, result.err
    files = [here / folder / "data" / "self_generated.json" for folder in ("run", "stored")]
    assert files[0].read_text() == files[1].read_text()
    assert "cache: a cache is given" in (here / "run" / "report.html").read_text()
    other = holdfast("train", *asked, "--out=other", cached, "seed=7")
    assert other.code == 2
    assert "is not in it; build it from this run's recipe" in other.err
    assert not (here / "other").exists()


def test_a_padded_stage_is_compared(here: Path, quick: list[str], holdfast: Any) -> None:
    """Through the command line; a stage with other tokens is in test_bad_input.py."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(here / "tiny", here / "padded")
    padded = AutoModelForCausalLM.from_pretrained("tiny")
    padded.resize_token_embeddings(padded.config.vocab_size + 4)
    padded.save_pretrained(here / "padded")
    asked = ["train", "--model=tiny", "--data=lesson.jsonl", *quick]
    found = holdfast(*asked, "--out=run", "levers.kl_anchor.reference=padded")
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    ("steps", "weight"), [(0, 1.0), (75, 1.0), (150, 2.0), (600, 8.0), (1500, 20.0), (9000, 20.0)]
)
def test_the_automatic_weight_is_a_75th_of_the_steps_within_bounds(steps, weight):
    assert KlAnchor().strength(steps, 1.0) == pytest.approx(weight)
    assert KlAnchor(weight=3.0).strength(steps, 5.0) == 3.0


@pytest.mark.parametrize(
    ("steps", "loss", "weight"),
    [
        (0, 4.5, 1.0),
        (15, 4.5, 1.0),
        (75, 4.5, 4.5),
        (150, 4.5, 9.0),
        (600, 4.5, 20.0),
        (150, 0.6, 1.2),
        (600, 0.6, 4.8),
        (600, 0.0, 1.0),
    ],
)
def test_the_automatic_weight_grows_with_the_loss_of_the_base(steps, loss, weight):
    assert KlAnchor().strength(steps, loss) == pytest.approx(weight)


def test_a_run_weighs_its_kl_by_its_own_steps_and_its_base(tmp_path: Path):
    canary = {"unit": "nats", "split": "selection", "n": 1, "stderr": 0.0, "step": 0}
    before = [
        Reading("canary", "prose", value=1.0, **canary),
        Reading("canary", "code", value=2.0, **canary),
        Reading("canary", "code", value=9.0, **canary | {"split": "sealed"}),
        Reading("lesson", "rows", value=9.0, **canary),
    ]
    anchor = KlAnchor(self_generated=FEW)
    trainer = tiny_run([Adapter(method="lora", r=2), anchor], tmp_path, steps=2, before=before)
    weights: list[float] = []
    found = KlAnchor.terms

    def terms(*given: Any) -> dict[str, Term]:
        terms = found(*given)
        weights.extend(term.weight for term in terms.values())
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KlAnchor, "terms", terms)
        patch.setattr("holdfast.levers.kl_anchor.STEPS_A_UNIT", 0.5)
        trainer.train()
    assert set(weights) == {6.0}  # 2 steps / 0.5, times (1 + 2) / 2 nats
