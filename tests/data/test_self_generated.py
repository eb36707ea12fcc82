"""Text that the base writes itself: its own distribution, seeded, kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from holdfast.data.example import Example, Role
from holdfast.data.self_generated import generate, generate_stream
from holdfast.decode import write_on
from holdfast.errors import RequestError


def sampled(model: Any, tokenizer: Any, folder: Path, **changes: Any) -> list[Example]:
    settings = {"rows": 6, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    return generate(model, tokenizer, **settings | changes, keep=folder / "kept.json")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny("Llama")


def test_the_same_seed_writes_the_same_and_the_global_generators_do_not_move(
    model: Any, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    runs = [
        sampled(model, tiny.letters(), tmp_path / str(i), seed=seed)
        for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert sampled(model, tiny.letters(), tmp_path / "later", seed=3) == runs[0] == runs[1]
    assert runs[2] != runs[0]


def test_rows_are_kept_and_read_back_only_for_the_same_settings(model: Any, tmp_path: Path) -> None:
    first = sampled(model, tiny.letters(), tmp_path)
    kept = json.loads((tmp_path / "kept.json").read_text())
    kept["rows"][0][0][1] = 999  # a mark that no sampling could leave
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    again = sampled(model, tiny.letters(), tmp_path)
    assert again[0].input_ids[1] == 999
    assert again[1:] == first[1:]
    changes = {"rows": 5}, {"max_new_tokens": 11}, {"temperature": 0.9}, {"seed": 1}
    for change in changes:
        fresh = sampled(model, tiny.letters(), tmp_path, **change)
        assert all(999 not in example.input_ids for example in fresh)
    other_start = tiny.letters(eos_token="</s>", pad_token="<pad>")
    assert sampled(model, other_start, tmp_path)[0].input_ids[0] == tiny.EOS


def test_a_row_ends_with_its_end_token_and_is_scored_from_the_first_sampled_one(
    model: Any, tmp_path: Path
) -> None:
    rows = sampled(model, tiny.letters(), tmp_path, rows=100, max_new_tokens=20)
    assert len(rows) == 100
    ended = [row.input_ids for row in rows if tiny.EOS in row.input_ids]
    assert len(ended) > 10
    assert all(ids.index(tiny.EOS) == len(ids) - 1 for ids in ended)
    for row in rows:
        assert row.input_ids[0] == tiny.BOS
        assert len(row.input_ids) == 21 or row.input_ids[-1] == tiny.EOS
        assert row.loss_mask == [False] + [True] * (len(row.input_ids) - 1)
        assert row.domain == "self_generated"


def test_without_bos_a_text_begins_after_an_end(model: Any, tmp_path: Path) -> None:
    tokenizer = tiny.letters(eos_token="</s>", pad_token="<pad>")
    rows = sampled(model, tokenizer, tmp_path)
    assert {row.input_ids[0] for row in rows} == {tiny.EOS}
    assert all(len(row.input_ids) > 1 for row in rows)


def test_with_neither_bos_nor_eos_there_is_no_start(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither BOS nor EOS"):
        sampled(model, tiny.letters(pad_token="<pad>"), tmp_path)


# ---- chat


def test_a_chat_model_asks_itself_and_answers(model: Any, tmp_path: Path) -> None:
    """<user>, sampled words, <bot>, sampled words: the template's order, in 21 tokens."""
    rows = sampled(model, tiny.letters(tiny.CHAT), tmp_path, rows=40, max_new_tokens=20)
    assert len({tuple(row.input_ids) for row in rows}) == 40
    for row in rows:
        ids = row.input_ids
        assert ids[0] == tiny.USER
        assert tiny.BOT in ids
        question = ids[1 : ids.index(tiny.BOT)]
        assert len(question) <= 5  # a quarter of what the template's start leaves
        assert not {tiny.USER, tiny.BOS, tiny.EOS, tiny.PAD} & set(question)
        answer = ids[ids.index(tiny.BOT) + 1 :]
        assert answer
        assert len(ids) == 21 or answer[-1] == tiny.EOS
        assert row.loss_mask == [False] + [True] * (len(ids) - 1)
    assert len({tuple(row.input_ids[: row.input_ids.index(tiny.BOT)]) for row in rows}) > 20


LONG = "<bot>you are a kind helper.</s>" + tiny.CHAT
"""A template that begins with words of its own."""


@pytest.mark.parametrize("most", [32, 40, 63])
def test_a_row_holds_the_template_too(model: Any, tmp_path: Path, most: int) -> None:
    """`max_new_tokens` is chosen so that a row fits the longest sequence, template and all."""
    tokenizer = tiny.letters(LONG)
    start = tokenizer("<bot>you are a kind helper.</s><user>")["input_ids"]
    rows = sampled(model, tokenizer, tmp_path, max_new_tokens=most)
    for row in rows:
        assert row.input_ids[: len(start)] == start
        assert len(start) < len(row.input_ids) <= most + 1
        assert row.loss_mask == [i >= len(start) for i in range(len(row.input_ids))]


def test_a_template_that_leaves_no_room_is_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"opens with 25 tokens.*rows of 28; raise data.max"):
        sampled(model, tiny.letters(LONG), tmp_path, max_new_tokens=27)


def test_a_template_that_shows_no_words_falls_back_to_plain_text(
    model: Any, tmp_path: Path
) -> None:
    for template in ("nothing", "{{ messages[0].content }}"):
        rows = sampled(model, tiny.letters(template), tmp_path / template[:3])
        assert {row.input_ids[0] for row in rows} == {tiny.BOS}
        assert all(row.loss_mask[1:] == [True] * (len(row.input_ids) - 1) for row in rows)


# ---- the stream


def test_the_stream_holds_the_kept_rows(model: Any, tmp_path: Path) -> None:
    stream = generate_stream(
        model,
        tiny.letters(),
        name="anchors",
        share=0.25,
        rows=5,
        max_new_tokens=8,
        temperature=1.0,
        seed=2,
        folder=tmp_path,
    )
    kept = json.loads((tmp_path / "anchors.json").read_text())["rows"]
    assert (stream.role, stream.share) == (Role.ANCHOR, 0.25)
    assert [list(map(list, stream.fetch(i))) for i in range(5)] == kept
    assert stream.lengths.tolist() == [len(ids) for ids, _ in kept]


def test_progress_is_told_in_different_rows(model: Any, tmp_path: Path) -> None:
    told: list[int] = []
    rows = sampled(
        model, tiny.letters(), tmp_path, rows=600, max_new_tokens=6, progress=told.append
    )
    assert told == sorted(told)
    assert told[-1] == len(rows) == 600
    assert len(told) > 1


# ---- doubles


def test_the_rows_are_the_first_different_ones(model: Any, tmp_path: Path) -> None:
    """Against all rows by number, doubles taken out by hand."""
    rows = sampled(model, tiny.letters(), tmp_path, rows=40, max_new_tokens=2, seed=5)
    drawn = write_on(
        model,
        tiny.letters(),
        [[tiny.BOS]] * 120,
        max_new_tokens=2,
        temperature=1.0,
        seed=[5, 0],
    )
    assert len({tuple(ids) for ids in drawn[:40]}) < 40
    expected = list(dict.fromkeys((tiny.BOS, *ids) for ids in drawn))[:40]
    assert [tuple(row.input_ids) for row in rows] == expected


def test_a_model_that_always_writes_the_same_ends_with_one_row(tmp_path: Path) -> None:
    model = tiny.tiny("Llama")
    said: dict[str, str] = {}
    cold = {"rows": 50, "temperature": 1e-4}
    (row,) = sampled(model, tiny.letters(), tmp_path, notes=said, **cold)
    assert said == {"kept": "the base writes 1 different rows, 50 were asked for"}
    said.clear()
    assert sampled(model, tiny.letters(), tmp_path, notes=said, **cold) == [row]
    assert said
    assert row.input_ids[0] == tiny.BOS


# ---- rows from elsewhere


def test_rows_are_taken_from_another_folder_and_kept(model: Any, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    first = sampled(model, tiny.letters(), cache)
    kept = json.loads((cache / "kept.json").read_text())
    kept["rows"][0][0][1] = 999  # a mark that no sampling could leave
    (cache / "kept.json").write_text(json.dumps(kept))
    others = [tmp_path / "none.json", cache / "kept.json"]
    taken = sampled(model, tiny.letters(), run, kept=others)
    assert taken[0].input_ids[1] == 999
    assert taken[1:] == first[1:]
    assert sampled(model, tiny.letters(), run) == taken


def test_rows_of_another_base_are_not_taken(model: Any, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    other = sampled(tiny.tiny("Llama", seed=1), tiny.letters(), cache)
    own = sampled(model, tiny.letters(), run, kept=[cache / "kept.json"])
    assert own != other
    assert own == sampled(model, tiny.letters(), tmp_path / "alone")


# ---- vLLM


class FakeParams:
    """Takes what vllm.SamplingParams takes, and nothing else."""

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        max_tokens: int,
        stop_token_ids: list[int],
        detokenize: bool,
        logprobs: int,
        seed: int,
    ) -> None:
        assert (top_k, top_p, detokenize, logprobs) == (-1, 1.0, False, 0)
        assert max_tokens > 0
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.ends = stop_token_ids


class FakeLLM:
    """Samples token by token from the folder's model, without a cache."""

    seeds: ClassVar[list[int]] = []

    def __init__(self, *, model: str, revision: str | None, **settings: Any) -> None:
        assert settings["generation_config"] == "vllm"
        assert settings["skip_tokenizer_init"]
        assert (settings["dtype"], revision) == ("float32", None)
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.longest = settings["max_model_len"]

    def generate(self, prompts: list[dict[str, list[int]]], params: list[FakeParams]) -> list[Any]:
        pairs = zip(prompts, params, strict=True)
        return [SimpleNamespace(outputs=[self.one(p["prompt_token_ids"], how)]) for p, how in pairs]

    @torch.no_grad()
    def one(self, prompt: list[int], how: FakeParams) -> Any:
        self.seeds.append(how.seed)
        random, ids, total = torch.Generator().manual_seed(how.seed), list(prompt), 0.0
        for _ in range(how.max_tokens):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
            p = (logits / how.temperature).softmax(-1)
            ids.append(int(torch.multinomial(p, 1, generator=random)))
            total += float(logits.log_softmax(-1)[ids[-1]])
            if ids[-1] in how.ends:
                break
        assert len(ids) <= self.longest
        return SimpleNamespace(token_ids=tuple(ids[len(prompt) :]), cumulative_logprob=total)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    FakeLLM.seeds.clear()
    yield
    FakeLLM.seeds.clear()


@pytest.fixture
def on_disk(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("template", [None, tiny.CHAT])
@pytest.mark.usefixtures("vllm")
def test_vllm_writes_where_it_is_asked_for(
    on_disk: Any, template: str | None, tmp_path: Path
) -> None:
    rows = sampled(on_disk, tiny.letters(template), tmp_path, rows=12, engine="vllm")
    assert json.loads((tmp_path / "kept.json").read_text())["engine"] == "vllm"
    assert len({tuple(row.input_ids) for row in rows}) == 12
    start = tiny.BOS if template is None else tiny.USER
    for row in rows:
        assert row.input_ids[0] == start
        assert len(row.input_ids) <= 13
        assert row.loss_mask == [False] + [True] * (len(row.input_ids) - 1)
    assert len(set(FakeLLM.seeds)) == len(FakeLLM.seeds), "each row has a seed of its own"


@pytest.mark.usefixtures("vllm")
def test_a_model_that_vllm_does_not_have_is_refused(on_disk: Any, tmp_path: Path) -> None:
    tiny.moved(on_disk, 0.3)  # as an adapter merged in memory
    with pytest.raises(RequestError, match=r"nats a token, the model in memory.*to holdfast"):
        sampled(on_disk, tiny.letters(), tmp_path, engine="vllm")
    assert not (tmp_path / "kept.json").exists()


def test_without_vllm_it_is_not_imported_and_named_when_asked_for(
    model: Any, tmp_path: Path
) -> None:
    assert find_spec("vllm") is None, "this test needs a machine without vLLM"
    sampled(model, tiny.letters(), tmp_path)
    assert json.loads((tmp_path / "kept.json").read_text())["engine"] == "holdfast"
    with pytest.raises(RequestError, match="install vllm"):
        sampled(model, tiny.letters(), tmp_path, rows=3, engine="vllm")


@pytest.mark.usefixtures("vllm")
def test_auto_leaves_vllm_alone_on_a_cpu(on_disk: Any, tmp_path: Path) -> None:
    sampled(on_disk, tiny.letters(), tmp_path)
    assert not FakeLLM.seeds
