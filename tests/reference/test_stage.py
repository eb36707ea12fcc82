"""A stage named by its path: what it is made of, what it is compared with, what does not fit."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from looking import IDS, POSITIONS, logits, seen_by
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.lineage import locate
from holdfast.model import Model
from holdfast.reference.stage import stage


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder in the current one."""
    monkeypatch.chdir(tmp_path)
    return tiny.save(tmp_path / "base_model", tiny.tiny("Llama"), tiny.letters())


def adapter_on(model: Any, folder: Path, seed: int = 1, **settings: Any) -> torch.Tensor:
    """An adapter on a loaded model, moved and saved; the logits of the two together."""
    config = LoraConfig(**{"r": 4, "target_modules": ["up_proj", "q_proj"], **settings})
    tuned = get_peft_model(model, config)
    tiny.moved(tuned, seed=seed)
    tuned.save_pretrained(folder)
    return logits(tuned.eval())


def load(path: Path | str) -> Any:
    settings = Model(path=str(path))
    models.check_folder(settings)
    tokenizer = models.load_tokenizer(settings)
    return models.load_model(settings, adapter=True, tokenizer=tokenizer)


def make_run(folder: Path, base: Path, full: bool = False) -> torch.Tensor:
    """A run folder as a run leaves it, and the logits of what it came to."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(base), "revision": None},
                "resolved": {"lineage": [{"path": str(base), "weights_sha256": "ab"}]},
            }
        )
    )
    if not full:
        return adapter_on(load(base), folder / "adapter")
    model = load(base)
    tiny.moved(model, spread=0.05)
    tiny.save(folder / "model", model, tiny.letters())
    return logits(model)


@pytest.mark.parametrize("full", [True, False])
def test_a_run_is_what_it_came_to(base: Path, full: bool) -> None:
    expected = make_run(Path("runs/one"), base, full)
    found = load("runs/one")
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in found.named_parameters() if "lora" in name]
    assert (expected - logits(tiny.tiny("Llama"))).abs().max() > 0.1
    where = locate("runs/one")
    assert where.parents() == [{"path": str(base), "weights_sha256": "ab"}]
    assert len(where.adapters) == (not full)


def test_an_adapter_is_merged_into_its_base(base: Path) -> None:
    expected = adapter_on(load(base), Path("one"))
    torch.testing.assert_close(logits(load("one")), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_an_adapter_is_merged_in_order(base: Path) -> None:
    adapter_on(load(base), Path("one"))
    expected = adapter_on(load("one"), Path("two"), seed=2)
    config = json.loads(Path("two/adapter_config.json").read_text())
    Path("two/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "one"})
    )
    assert [path.name for path in locate("two").adapters] == ["one", "two"]
    torch.testing.assert_close(logits(load("two")), expected, rtol=1e-4, atol=1e-4)


def test_the_base_in_a_runs_folder_goes_before_the_one_its_adapter_names(base: Path) -> None:
    expected = make_run(Path("run"), base)
    shutil.move(base, "run/base")
    for path in ("run", "run/adapter"):
        torch.testing.assert_close(logits(load(path)), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_named_base_beside_anyone_elses_adapter_is_not_its_base(base: Path) -> None:
    expected = adapter_on(load(base), Path("zoo/adapter"))
    tiny.save(Path("zoo/base"), tiny.tiny("Llama", seed=9), tiny.letters())
    torch.testing.assert_close(logits(load("zoo/adapter")), expected, rtol=1e-4, atol=1e-4)


def test_tokenizer_and_revision_are_those_of_the_stage(base: Path) -> None:
    make_run(Path("runs/one"), base)
    assert locate("runs/one").tokenizer == str(base), "the base's, where the adapter has none"
    tiny.letters().save_pretrained("runs/one/adapter")
    assert locate("runs/one").tokenizer == "runs/one/adapter"
    edited("runs/one/adapter", base_model_name_or_path="some/model")
    recipe = {"model": {"path": "some/model", "revision": "v2"}, "resolved": {}}
    Path("runs/one/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert locate("runs/one").revision == "v2"


# ---- as a reference


def test_every_stage_can_be_the_reference(base: Path) -> None:
    """Two stages, two references: neither is silently the original base."""
    first = make_run(Path("runs/one"), base)
    tuned = load("runs/one")
    start = logits(tuned)
    tiny.moved(tuned, seed=5)
    for path, expected in (("runs/one", start), (str(base), logits(tiny.tiny("Llama")))):
        seen = seen_by(stage(path, tiny.letters(), tuned))
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
    assert (first - logits(tiny.tiny("Llama"))).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_stage_can_be_held_in_less(base: Path, dtype: Any) -> None:
    expected = logits(load(base)).log_softmax(-1)
    reference = stage(str(base), tiny.letters(), load(base), dtype, "offload")
    seen = seen_by(reference).log_softmax(-1)
    assert 0 < float((expected.exp() * (expected - seen)).sum(-1).mean()) < 0.05


def test_padded_vocabularies_are_the_same(base: Path) -> None:
    padded = tiny.tiny("Llama", vocab_size=64)
    tiny.save(Path("padded"), padded, tiny.letters())
    reference = stage("padded", tiny.letters(), load(base))
    with torch.no_grad():
        expected = padded(input_ids=IDS, position_ids=POSITIONS).logits
    torch.testing.assert_close(seen_by(reference), expected)


def test_other_tokens_are_refused(base: Path) -> None:
    tokenizer = tiny.letters()
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(RequestError, match=r"reference: 'base_model'.*'<more>' is no token there"):
        stage("base_model", tokenizer, None)


def test_a_stage_without_a_tokenizer_is_refused(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RequestError, match=r"kl_anchor\.reference: 'base_model' has no tokenizer"):
        stage("base_model", tiny.letters(), None)


# ---- what does not fit


def edited(folder: str, **fields: Any) -> None:
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def other_shapes(_base: Path) -> None:
    tiny.save(Path("wide"), tiny.tiny("Llama", intermediate_size=64), tiny.letters())
    edited("one", base_model_name_or_path="wide")


def fewer_layers(_base: Path) -> None:
    tiny.save(Path("low"), tiny.tiny("Llama", num_hidden_layers=1), tiny.letters())
    edited("one", base_model_name_or_path="low")


def more_layers(_base: Path) -> None:
    tiny.save(Path("high"), tiny.tiny("Llama", num_hidden_layers=3), tiny.letters())
    edited("one", base_model_name_or_path="high")


def other_architecture(_base: Path) -> None:
    tiny.save(Path("gpt2"), tiny.tiny("GPT2"), tiny.letters())
    edited("one", base_model_name_or_path="gpt2")


def not_finite(_base: Path) -> None:
    file = "one/adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor * torch.nan for name, tensor in weights.items()}, file)


def pickled(_base: Path) -> None:
    Path("one/adapter_model.safetensors").rename("one/adapter_model.bin")


def no_weights(_base: Path) -> None:
    Path("one/adapter_model.safetensors").unlink()


def torn(_base: Path) -> None:
    file = Path("one/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


def both(base: Path) -> None:
    shutil.copy(base / "config.json", "one")


def tied_head(base: Path) -> None:
    shutil.rmtree("one")
    tied = tiny.tiny("Llama", tie_word_embeddings=True)
    tiny.save(base, tied, tiny.letters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that merging will not work
        adapter_on(load(base), Path("one"), target_modules=["lm_head"])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other shapes": (other_shapes, "'one' does not fit its base 'wide': .*size mismatch"),
    "fewer layers": (fewer_layers, "does not fit its base 'low': .*layers.1.* not for it"),
    "more layers": (more_layers, "does not fit its base 'high': .*layers.2.* missing in it"),
    "other architecture": (other_architecture, "does not fit its base 'gpt2'.*give the base"),
    "not finite": (not_finite, "holds values that are not finite .*lora_A.* earlier checkpoint"),
    "pickled": (pickled, "adapter_model.bin' is a pickle and is never loaded"),
    "no weights": (no_weights, "has no adapter_model.safetensors weights"),
    "torn": (torn, "does not fit its base"),
    "a model and an adapter": (both, "holds both a model .* give each a folder of its own"),
    "no base": (lambda _: edited("one", base_model_name_or_path=None), "names no base; set"),
    "itself": (lambda _: edited("one", base_model_name_or_path="one"), "whose base is itself"),
    "a base that is gone": (
        lambda _: edited("one", base_model_name_or_path="./gone"),
        "is an adapter whose base './gone' does not exist",
    ),
    "a tied head": (tied_head, "cannot be merged .* without changing"),
    "not JSON": (lambda _: Path("one/adapter_config.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_adapter_that_does_not_fit_is_one_clear_line(name: str, base: Path) -> None:
    adapter_on(load(base), Path("one"))
    load("one")
    spoil, said = SPOILT[name]
    spoil(base)
    with pytest.raises(RequestError, match=said) as caught:
        load("one")
    assert len(caught.value.problems) == 1
    assert ";" in caught.value.problems[0], "how to mend it"


def test_a_run_that_has_not_ended_is_refused(base: Path) -> None:
    make_run(Path("runs/one"), base)
    shutil.rmtree("runs/one/adapter")
    with pytest.raises(
        RequestError, match=r"has not ended .*holdfast train --resume --out runs/one"
    ):
        load("runs/one")


# ---- a second stage from the command line


def test_a_second_stage_starts_from_a_run(
    finished_run: Path, tiny_lesson: Path, tmp_path: Path, quick: list[str], holdfast: Any
) -> None:
    """Its base is stage one merged; its adapter loads with plain peft onto just that."""
    out = tmp_path / "two"
    command = ["train", f"--model={finished_run}", f"--data={tiny_lesson}", f"--out={out}"]
    result = holdfast(*command, *quick, f"levers.kl_anchor.reference={finished_run}")
    assert result.code == 0, result.err
    first, second = (
        yaml.safe_load((folder / "recipe.yaml").read_text())["resolved"]
        for folder in (finished_run, out)
    )
    merged = load(finished_run)
    assert second["lineage"][:-1] == first["lineage"]
    assert second["lineage"][-1] == {
        "path": str(finished_run),
        "weights_sha256": models.hash_weights(merged),
    }
    assert first["lineage"][0]["weights_sha256"] == first["weights_sha256"]
    assert first["weights_sha256"] != second["weights_sha256"]
    plain = AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    through_us = load(out)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, through_us(ids).logits, rtol=1e-4, atol=1e-4)
        whole = copy.deepcopy(merged)
        assert not torch.equal(through_us(ids).logits, whole(ids).logits)
