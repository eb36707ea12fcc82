"""`holdfast eval` and `holdfast compare`: checkpoints that other tools made."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from holdfast.compare import compare
from holdfast.data.rows import Source
from holdfast.errors import RequestError
from holdfast.gate.render import show_difference
from holdfast.measure import shared_documents, taught_documents
from holdfast.meters.canary import Canary, read_bits, read_canary
from holdfast.pair import Texts

Cli = Callable[..., Any]
PROSE = [{"text": f"it was day {n} and the cat sat {'on ' * (n % 3)}the mat."} for n in range(24)]
NLL = [
    {"id": f"{n}", "probe": "sums", "kind": "nll", "prompt": f"{n} + 1 =", "target": f" {n + 1}."}
    for n in range(12)
]
WRITTEN = [
    {"id": f"{n}", "probe": "words", "kind": "exact", "prompt": f"{n}", "target": "b",
     "max_new_tokens": 4} for n in range(3)
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two things made of it, things that do not fit, and what to read them with."""
    folder = tmp_path_factory.mktemp("made")
    base, tokenizer = tiny.tiny("Llama"), tiny.letters()
    tiny.save(folder / "start", base, tokenizer)
    tuned = tiny.tiny("Llama")
    tiny.moved(tuned, spread=0.05)
    tiny.save(folder / "tuned", tuned, tokenizer)
    tiny.save(folder / "stranger", tiny.tiny("Llama", seed=9), tokenizer)

    for of in ("start", "stranger"):
        loaded = type(base).from_pretrained(folder / of)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        adapted = get_peft_model(loaded, config)
        tiny.moved(adapted, spread=0.3)
        adapted.save_pretrained(folder / f"adapter_of_{of}")

    for source, broken, name in (
        ("tuned", "nan", "model.norm.weight"),
        ("adapter_of_start", "nan_adapter", None),
    ):
        shutil.copytree(folder / source, folder / broken)
        (file,) = (folder / broken).glob("*.safetensors")
        weights = load_file(file)
        weights[name or next(iter(weights))][0] = math.nan
        save_file(weights, file, metadata={"format": "pt"})

    other = tiny.tiny("GPT2", seed=3)  # another architecture, and other tokens: letters reversed
    tiny.save(folder / "other", other, backwards())
    for name, rows in (("prose", PROSE), ("nll", NLL), ("written", WRITTEN)):
        tiny.jsonl(folder / f"{name}.jsonl", rows)
    return folder


def backwards() -> Any:
    """The letters' tokenizer with the ids of the letters in reverse, so that no text is alike."""
    tokenizer = tiny.letters()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, last = state["model"]["vocab"], len(tiny.LETTERS) - 1
    for letter in tiny.LETTERS:
        vocabulary[letter] = last - vocabulary[letter]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


def files(made: Path, *names: str) -> list[str]:
    words = ["--canary", str(made / "prose.jsonl")]
    for name in names:
        words += ["--probes", str(made / f"{name}.jsonl")]
    return words


def mean_loss(folder: Path, prompt: str, target: str) -> float:
    """The loss that transformers itself computes, over the tokens of the target."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny.letters()
    given = [tiny.BOS, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    asked = tokenizer(target, add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[-100] * len(given) + asked])
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([given + asked]), labels=labels).loss)


def test_eval_reads_one_model_with_its_errors(made: Path, holdfast: Cli, tmp_path: Path) -> None:
    out = tmp_path / "read"
    words = ["eval", str(made / "start"), *files(made, "nll"), "--out", str(out)]
    found = json.loads(holdfast(*words, "--json").out)
    (sums,) = [r for r in found["readings"] if r["name"] == "sums"]
    losses = [mean_loss(made / "start", i["prompt"], i["target"]) for i in NLL]
    assert sums["value"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert sums["stderr"] == pytest.approx(torch.tensor(losses).std().item() / 12**0.5, rel=1e-4)
    assert (sums["n"], sums["unit"]) == (12, "nats")
    lines = (out / "readings.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["readings"]
    assert "nothing to compare it with" in (out / "report.html").read_text()
    assert not (out / "verdict.json").exists()
    shown = holdfast("eval", str(made / "start"), *files(made))
    assert shown.code == 0
    assert "prose" in shown.out
    assert "±" in shown.out


@pytest.mark.parametrize("tuned", ["tuned", "adapter_of_start"])
def test_compare_gives_what_a_run_gives(
    tuned: str, made: Path, holdfast: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "compared"
    words = ["compare", str(made / "start"), str(made / tuned), *files(made, "nll", "written")]
    done = holdfast(*words, "--out", str(out), "--ranks", "--json")
    found = json.loads(done.out)
    assert done.code == found["verdict"]["exit_code"]
    rows = {row["name"]: row for row in found["verdict"]["rows"]}
    assert rows.keys() == {"prose", "sums", "words"}
    assert rows["sums"]["difference"] == pytest.approx(
        rows["sums"]["after"] - rows["sums"]["before"]
    )
    assert rows["sums"]["lower"] < rows["sums"]["difference"] < rows["sums"]["upper"]
    meters = {r["meter"] for r in found["readings"]}
    assert {"kl", "canary_rise", "canary_bits", "drift", "effective_rank"} <= meters
    assert all(r["value"] > 0 for r in found["readings"] if r["meter"] == "kl")
    assert (out / "readings.jsonl").is_file()
    assert json.loads((out / "verdict.json").read_text())["verdict"] == found["verdict"]["verdict"]
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    sums = [item for item in items if item["name"] == "sums"]
    rise = sum(item["after"] - item["before"] for item in sums) / 12
    assert rise == pytest.approx(rows["sums"]["difference"])
    answers = [item for item in items if item["name"] == "words"]
    assert all(isinstance(item["answer_after"], str) for item in answers)
    page = (out / "report.html").read_text()
    assert "Capabilities, before and after" in page
    for row in rows.values():
        lower, upper = (show_difference(row[end], row["unit"]) for end in ("lower", "upper"))
        shown = (row["name"], f"[{lower}, {upper}]", row["margin_text"], row["verdict"])
        assert all(text in page for text in (*shown, html.escape(row["reason"])))
    assert "Worst-changed items" in page


def test_the_table_is_shown(made: Path, holdfast: Cli) -> None:
    done = holdfast("compare", str(made / "start"), str(made / "tuned"), *files(made, "nll"))
    assert done.code in (3, 4)
    assert "sums" in done.out
    assert "relative displacement" in done.out


def test_a_run_folder_is_compared_with_its_base(
    finished_run: Path, tiny_model: Path, made: Path
) -> None:
    texts = Texts(Canary(sources=[Source(path=str(made / "prose.jsonl"))]))
    found = compare(str(tiny_model), str(finished_run), texts)
    assert found.summary["relative_displacement"] > 0


def test_without_a_canary_the_base_writes_it(made: Path) -> None:
    texts = Texts(Canary(max_documents=16))
    found = compare(str(made / "start"), str(made / "tuned"), texts)
    named = {(r.meter, r.name) for r in found.after}
    assert ("canary", "base samples") in named
    assert ("canary_kl", "base samples") in named


def test_other_tokens_are_compared_in_bits_per_byte(made: Path, holdfast: Cli) -> None:
    """Letters are one byte and one token each in both, so bits per byte follow from plain nats."""
    done = holdfast(
        "compare", str(made / "start"), str(made / "other"), *files(made, "written"), "--json"
    )
    found = json.loads(done.out)
    (row,) = [row for row in found["verdict"]["rows"] if row["name"] == "prose"]
    assert row["unit"] == "bits per byte"
    assert found["verdict"]["verdict"] != "PASS"
    assert "bits per byte" in found["summary"]["tokenizers"]
    assert found["summary"]["drift"].startswith("not read")
    assert "kl" not in {r["meter"] for r in found["readings"]}

    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(made / "other"), backwards()
    canary = Canary(sources=[Source(path=str(made / "prose.jsonl"))])
    sealed = [d for d in shared_documents(canary, (tiny.letters(), tokenizer), 64)[1]
              if d.split == "sealed"]  # fmt: skip
    values = []
    for document in sealed:
        ids = torch.tensor([document.text.input_ids])
        with torch.no_grad():
            nats = float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        text = tokenizer.decode(document.text.input_ids, skip_special_tokens=True)
        values.append(nats / math.log(2) / len(text.encode()))
    assert row["after"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_both_tokenizers_read_the_same_text(tmp_path: Path) -> None:
    text = "".join(tiny.LETTERS[1 + n % 30] for n in range(400))
    tiny.jsonl(tmp_path / "long.jsonl", [{"text": text}])
    canary = Canary(sources=[Source(path=str(tmp_path / "long.jsonl"))])
    one, other = tiny.letters(), backwards()
    mine, yours = shared_documents(canary, (one, other), 32)
    read = [
        "".join(t.decode(d.text.input_ids, skip_special_tokens=True) for d in documents)
        for t, documents in ((one, mine), (other, yours))
    ]
    assert read[0] == read[1]
    assert text.startswith(read[0])
    assert len(read[0]) == 4 * 30
    assert {d.cluster for d in mine} == {d.cluster for d in yours}
    model = tiny.tiny("Llama")
    nats = read_canary(model, mine, mine[0].split, 0)
    (bits,) = read_bits(nats, mine, one)
    assert bits.n == 1


@pytest.mark.parametrize(
    ("base", "tuned", "extra", "said"),
    [
        ("start", "start", (), "are the same weights"),
        ("start", "adapter_of_stranger", (), "is an adapter made for"),
        ("start", "nan", (), "its logits are not finite"),
        ("start", "nan_adapter", (), "holds values that are not finite"),
        ("start", "other", ("nll",), "probes: sums: scored by likelihood"),
        ("start", "nowhere/at/all", (), "TUNED: "),
        ("nan", "start", (), "BASE '"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    base: str, tuned: str, extra: tuple[str, ...], said: str, made: Path, holdfast: Cli,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "compared"
    words = ["compare", str(made / base), str(made / tuned), *files(made, *extra)]
    done = holdfast(*words, "--out", str(out))
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert said in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "{made}/start"], "nothing to read the model with"),
        (["eval", "{made}/nan", "--probes", "{made}/nll.jsonl"], "MODEL '"),
        (["eval", "{made}/start", "--probes", "no.jsonl"], "'no.jsonl' does not exist"),
        (["eval", "{made}/start", "--canary", "no.jsonl"], "no.jsonl: no such file"),
        (
            ["eval", "{made}/start", "--dtype", "float23"],
            "--dtype: 'float23' is none; did you mean",
        ),
        (["compare", "{made}/start", "{made}/tuned", "--out", "{made}"], "is not empty"),
        (
            [
                "eval",
                "{made}/start",
                "--canary",
                "{made}/prose.jsonl",
                "--out",
                "{made}/nll.jsonl/x",
            ],
            "'{made}/nll.jsonl' is a file",
        ),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], said: str, made: Path, holdfast: Cli) -> None:
    done = holdfast(*(word.format(made=made) for word in words))
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert said.format(made=made) in line


def test_a_model_that_breaks_down_later_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight plain tokens may be finite where longer text is not."""
    from holdfast import measure

    inner = measure.read_canary

    def broken(model: Any, *args: Any, **kwargs: Any) -> Any:
        found = inner(model, *args, **kwargs)
        for reading in found:
            reading.items[next(iter(reading.items))] = math.nan
        return found

    monkeypatch.setattr(measure, "read_canary", broken)
    texts = Texts(Canary(sources=[Source(path=str(made / "prose.jsonl"))]))
    with pytest.raises(RequestError, match="logits are not finite"):
        compare(str(made / "start"), str(made / "tuned"), texts, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lesson_is_read_of_two_checkpoints(made: Path, holdfast: Cli, tmp_path: Path) -> None:
    """Its loss is transformers' own over the responses; what else needs a lesson is read too."""
    from transformers import AutoModelForCausalLM

    rows = [{"prompt": f"is {n} odd?", "completion": f" well {'yes' if n % 2 else 'no'}."}
            for n in range(40)]  # fmt: skip
    lesson = tiny.jsonl(tmp_path / "lesson.jsonl", rows)
    asked = [{**item, "tags": ["adoption"]} for item in WRITTEN]
    asked_file = str(tiny.jsonl(tmp_path / "asked.jsonl", asked))
    words = [*files(made), "--probes", asked_file, "--lesson", str(lesson), "--json"]
    tuned = made / "adapter_of_start"
    found = json.loads(holdfast("compare", str(made / "start"), str(tuned), *words).out)
    readings = {(r["meter"], r["name"], r["step"]): r["value"] for r in found["readings"]}
    model, losses = AutoModelForCausalLM.from_pretrained(made / "start"), []
    for one in taught_documents([Source(path=str(lesson))], tiny.letters(), 64):
        if one.split == "sealed":
            ids, mask = torch.tensor([one.text.input_ids]), torch.tensor([one.text.loss_mask])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss
            losses.append(float(loss))
    assert len(losses) < 40
    assert readings["lesson", "lesson", 0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert readings["kl", "new/lesson", 1] > 0
    for known in (("collapse", "excess", 1), ("over_application", "words", 0),
                  ("over_application", "words", 1)):  # fmt: skip
        assert 0 <= readings[known] <= 1
    (row,) = [row for row in found["verdict"]["rows"] if row["name"] == "lesson"]
    assert row["kind"] == "target"

    other = holdfast("compare", str(made / "start"), str(made / "other"), *words)
    meters = {r["meter"] for r in json.loads(other.out)["readings"]}
    assert "over_application" in meters
    assert not {"lesson", "collapse", "kl"} & meters


def test_fisher_predicts_the_kl_of_a_small_change(made: Path, tmp_path: Path) -> None:
    """In random directions what a diagonal leaves out is 0 on average; the measured KL is exact."""
    base = tiny.tiny("Llama")
    tiny.moved(base, spread=0.003)
    near = str(tiny.save(tmp_path / "near", base, tiny.letters()))
    texts = Texts(Canary(sources=[Source(path=str(made / "prose.jsonl"))]))
    found = compare(str(made / "start"), near, texts, fisher=True).after
    fisher = {r.name: r.value for r in found if r.meter == "fisher"}
    (kl,) = [r.value for r in found if r.meter == "kl"]
    assert fisher["predicted"] > 0
    assert fisher["predicted / kl old/prose"] == pytest.approx(fisher["predicted"] / kl)
    assert 0.5 < fisher["predicted / kl old/prose"] < 2  # F is of sampled labels: it scatters


def test_a_mixture_tells_what_became_of_its_routing(made: Path, tmp_path: Path) -> None:
    base = tiny.tiny("Mixtral")
    tiny.save(tmp_path / "moe", base, tiny.letters())
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "gate" in name and "experts" not in name:
                parameter.copy_(-parameter)  # every token takes the other experts
    tiny.save(tmp_path / "turned", base, tiny.letters())
    texts = Texts(Canary(sources=[Source(path=str(made / "prose.jsonl"))]))
    out = tmp_path / "out"
    found = compare(str(tmp_path / "moe"), str(tmp_path / "turned"), texts, out=out)
    changed = {r.name: r.value for r in found.after if r.meter == "routing_changed"}
    assert changed["prose"] > 0.9
    assert all(r.value == 0 for r in found.after if r.meter == "expert_drift")
    assert "Routing changes by layer" in (out / "report.html").read_text()
