"""The model as the objective sees it, and what is refused before a weight is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.model import Model

IDS = torch.arange(24).reshape(2, 12) * 7 % tiny.VOCABULARY
POSITIONS = torch.arange(12).expand(2, -1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model", tiny.tiny("Llama"), tiny.letters())


def load(folder: Path, **fields: Any) -> Any:
    chosen = Model(path=str(folder), **fields)
    return models.load_model(chosen, adapter=True, tokenizer=models.load_tokenizer(chosen))


# ---- backbone and head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", tiny.EXTRA)
def test_head_of_hidden_states_is_the_models_own_logits(name: str, tied: bool) -> None:
    model = tiny.tiny(name, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    ours = models.head(model)(models.hidden_states(model, IDS, POSITIONS))
    theirs = model(input_ids=IDS, position_ids=POSITIONS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.05
    models.check_head(model)


@pytest.mark.parametrize("name", ["GPT2", "Gemma2"])
def test_the_view_through_an_adapter_is_the_same(name: str) -> None:
    model = tiny.tiny(name)
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "GPT2")
    wrapped = get_peft_model(model, config)
    tiny.moved(wrapped)
    assert models.causal_lm(wrapped) is model
    ours = models.head(wrapped)(models.hidden_states(wrapped, IDS, POSITIONS))
    theirs = wrapped(input_ids=IDS, position_ids=POSITIONS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Squared(type(tiny.tiny("Llama"))):  # type: ignore[misc]
    """A head with a twist that no setting tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.square()
        return out


class NoHead(type(tiny.tiny("Llama"))):  # type: ignore[misc]
    def get_output_embeddings(self) -> Any:
        return None


class MovedHead(type(tiny.tiny("Llama"))):  # type: ignore[misc]
    """Calls its layers one by one, past the decoder that it names."""

    def get_decoder(self) -> Any:
        return nn.Identity()


@pytest.mark.parametrize(
    ("twisted", "said"),
    [(Squared, "not a linear layer"), (NoHead, "output head"), (MovedHead, "not a decoder")],
)
def test_a_head_with_an_unknown_twist_is_refused(twisted: Any, said: str) -> None:
    model = twisted(tiny.tiny("Llama").config).train()
    with pytest.raises(RequestError, match=said):
        models.check_head(model)
    assert model.training


def test_a_soft_cap_is_known_by_either_name() -> None:
    """RecurrentGemma's differs from Gemma 2's, and small logits do not show it."""
    model = tiny.tiny("Llama")
    assert models.head(model).cap is None
    model.config.logits_soft_cap = 30.0
    assert models.head(model).cap == 30.0


def test_a_head_that_carries_an_adapter_is_refused() -> None:
    """Its weight alone would leave the adapter's part out of the loss."""
    config = LoraConfig(r=2, target_modules=["lm_head", "up_proj"])
    with pytest.raises(RequestError, match=r"cannot carry an adapter.*modules_to_save"):
        models.head(get_peft_model(tiny.tiny("Llama"), config))


# ---- loading


RANDOM = {
    "Llama": {"attention_dropout": 0.5},
    "GPT2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "GPTNeoX": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "Mixtral": {"router_jitter_noise": 0.9, "attention_dropout": 0.5},
    "OPT": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "Falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("name", RANDOM)
def test_nothing_random_is_left_in_a_loaded_model(name: str, tmp_path: Path) -> None:
    noisy = tiny.tiny(name, **RANDOM[name]).train()
    quiet = load(tiny.save(tmp_path / "model", noisy, tiny.letters())).train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        first, *others = (noisy(IDS, position_ids=POSITIONS).logits for _ in range(8))
        assert not all(torch.equal(first, other) for other in others)
        still = noisy.eval()(IDS, position_ids=POSITIONS).logits
        for _ in range(8):
            torch.testing.assert_close(quiet(IDS, position_ids=POSITIONS).logits, still)


def test_the_tokenizer_must_fit_the_embedding(folder: Path) -> None:
    tokenizer = tiny.letters()
    tokenizer.add_tokens(["<more>", "<and more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(RequestError, match=f"has {tiny.VOCABULARY + 2} tokens.*{tiny.VOCABULARY}"):
        load(folder)


def test_an_embedding_larger_than_the_tokenizer_is_fine(tmp_path: Path) -> None:
    model = tiny.tiny("Llama", vocab_size=64)
    assert load(tiny.save(tmp_path / "m", model, tiny.letters())).vocab_size == 64


def test_a_missing_pad_token_becomes_the_end_token(tmp_path: Path) -> None:
    tiny.letters(bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    assert models.load_tokenizer(Model(path=str(tmp_path))).pad_token_id == tiny.EOS


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tiny.letters(bos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="neither pad nor EOS"):
        models.load_tokenizer(Model(path=str(tmp_path)))


@pytest.mark.parametrize("in_file", [False, True])
def test_a_chat_template_of_the_users_own(folder: Path, tmp_path: Path, in_file: bool) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(tiny.CHAT)
    template = str(file) if in_file else tiny.CHAT
    tokenizer = models.load_tokenizer(Model(path=str(folder), chat_template=template))
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<user>hi"


def test_a_folder_below_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    chosen = Model(path=f"~/{folder.name}")
    models.check_folder(chosen)
    tokenizer = models.load_tokenizer(chosen)
    assert models.load_model(chosen, adapter=True, tokenizer=tokenizer).vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("asked", "adapter", "expected"),
    [
        ("auto", False, torch.float32),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_one_asked_for(asked: Any, adapter: bool, expected: torch.dtype) -> None:
    assert models.dtype_of(Model(path="a/b", dtype=asked), adapter=adapter) is expected


# ---- pickles


class Payload:
    """Unpickled, it makes a file: what a hostile checkpoint could do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt"])
def test_a_pickle_is_refused_and_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "run by the pickle"
    torch.save({"weight": Payload(mark)}, folder / name)
    for attempt in (lambda: models.check_folder(Model(path=str(folder))), lambda: load(folder)):
        with pytest.raises(RequestError, match=f"{name}' is a pickle and is never loaded"):
            attempt()
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()  # so that the test could have failed


def test_beside_safetensors_a_pickle_is_left_alone(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run by the pickle"
    torch.save({"weight": Payload(mark)}, folder / "pytorch_model.bin")
    assert models.hash_weights(load(folder)) == models.hash_weights(tiny.tiny("Llama"))
    assert not mark.exists()


def test_a_torn_weight_file_is_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(RequestError, match="cannot be loaded"):
        load(folder)


# ---- folders


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("config.json"), "has no config.json; give a folder written by save_pretrained"),
        (an_adapter, "has no adapter_model.safetensors weights"),
        (write("config.json", "{"), "not JSON"),
        (write("config.json", "{}"), "field model_type is missing"),
        (write("config.json", "[]"), "field model_type is missing"),
        (without("model.safetensors"), "has no \\*.safetensors weights"),
        (no_tokenizer, "has no tokenizer; set model.tokenizer"),
        (a_file, "is a file; give the folder that holds config.json"),
    ],
)
def test_a_folder_is_refused_for_what_it_lacks(folder: Path, spoil: Any, said: str) -> None:
    models.check_folder(Model(path=str(folder)))
    spoil(folder)
    with pytest.raises(RequestError, match=said):
        models.check_folder(Model(path=str(folder)))


def test_a_folder_that_does_not_exist_is_named_with_its_neighbour(folder: Path) -> None:
    with pytest.raises(RequestError, match=f"does not exist; did you mean '{folder}'"):
        models.check_folder(Model(path=str(folder) + "s"))
    models.check_folder(Model(path="someone/on-the-hub"))


# ---- hashes


def test_the_hash_is_the_same_at_every_load_and_knows_names_and_types(folder: Path) -> None:
    first = load(folder)
    assert models.hash_weights(first) == models.hash_weights(load(folder))
    assert models.hash_weights(first) != models.hash_weights(first.bfloat16())
    assert models.hash_weights(tiny.tiny("Llama", seed=1)) != models.hash_weights(load(folder))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_hash_changes_with_any_one_weight(data: st.DataObject) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # counts batches in a 0-d tensor
    before = models.hash_weights(model)
    name = data.draw(st.sampled_from(sorted(model.state_dict())))
    flat = model.state_dict()[name].view(-1)
    flat[data.draw(st.integers(0, len(flat) - 1))] += 1
    assert models.hash_weights(model) != before
