"""Items frozen from lm-eval's own task definitions read as lm-eval's HF backend reads them.

The expected choices, log-likelihoods and scores come from lm-eval itself: `HFLM` on the requests of
the same tasks, and the tasks' own `process_results`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tiny
from holdfast.errors import RequestError
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.meters import importing
from holdfast.meters.importing import Frozen, import_task
from holdfast.meters.likelihood import likelihoods
from holdfast.meters.probes import Item, load_items, read_probes, write_items
from holdfast.meters.probes.encode import encode_items

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

SHARED = Path(__file__).parents[3] / "shared"
FOLDERS = (
    "mmlu/default",
    "gsm8k",
    "arc",
    "lambada",
    "blimp",
    "hellaswag",
    "winogrande",
    "truthfulqa",
)


@pytest.fixture(scope="module")
def manager() -> Any:
    """lm-eval's own definitions of a few tasks: reading all 14,000 takes a while."""
    root = Path(lm_eval_tasks.__file__).parent
    paths = [root / folder for folder in FOLDERS]
    return lm_eval_tasks.TaskManager(include_defaults=False, include_path=paths)


@pytest.fixture(autouse=True)
def _few_tasks(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_manager", lambda: manager)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A random model whose distribution is not flat, with a context for few-shot prompts."""
    tokenizer = train_tokenizer(["Question: what is 1 + 2? Answer: 3 the cat sat"], vocabulary=300)
    config = LlamaConfig(
        **tiny.SIZE | tiny.GROUPED | {"vocab_size": 300, "max_position_embeddings": 2048},
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.model_max_length = 2048
    return model, tokenizer


def rows(task: str) -> list[dict[str, Any]]:
    """Rows in the hub's columns."""
    numbers = range(12)
    return {
        "mmlu_virology": [
            {
                "question": f"Which is number {i}?",
                "subject": "virology" if i % 4 else "anatomy",
                "choices": [f"{i}", "x", "seven", "none of them"],
                "answer": i % 4,
            }
            for i in range(16)
        ],
        "gsm8k": [
            {"question": f"What is {i} + {i}?", "answer": f"It is {i}+{i}.\n#### {2 * i}"}
            for i in numbers
        ],
        "arc_easy": [
            {
                "question": f"What is {i} like?",
                "choices": {"text": ["a long answer indeed", "no", f"{i}"], "label": list("ABC")},
                "answerKey": "ABC"[i % 3],
            }
            for i in numbers
        ],
        "hellaswag": [
            {
                "ind": i,
                "activity_label": "Cooking",
                "ctx_a": f"Someone takes {i} eggs.",
                "ctx_b": "then they",
                "endings": ["eat.", f"break {i} of them over a bowl.", "go to sleep", "sing"],
                "label": str(i % 4),
            }
            for i in numbers
        ],
        "lambada_openai": [{"text": f"we saw {i} cats and one dog {i}"} for i in numbers],
        "blimp_adjunct_island": [
            {"sentence_good": f"Who is {i}?", "sentence_bad": f"{i} who is?", "UID": uid}
            for i in numbers
            for uid in ("adjunct_island", "passive_1")
        ],
        "winogrande": [
            {
                "sentence": f"The cat saw {i} dogs, so the _ ran away.",
                "option1": "cat",
                "option2": "dogs",
                "answer": str(1 + i % 2),
            }
            for i in numbers
        ],
        "truthfulqa": [
            {
                "question": f"What is {i}?",
                **{
                    f"mc{kind}_targets": {"choices": ["a", "b"], "labels": [1, 0]}
                    for kind in (1, 2)
                },
            }
            for i in numbers
        ],
    }[task]


def frozen(task: str, how: Frozen) -> tuple[list[Item], list[Any]]:
    """The items, and lm-eval's tasks with the requests that they were made of."""
    real, seen = importing._load, list[Any]()

    def load(*given: Any) -> list[Any]:
        seen.extend(real(*given))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "_load", load)
        return import_task(task, how), seen


def by_lm_eval(tasks: list[Any], model: Any, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """HFLM's answers, request by request, and the tasks' own scores, document by document."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    answers, scores = [], []
    for task in tasks:
        requests = getattr(task, "_instances", None)  # those of which no document was drawn
        if not requests:
            continue
        answered = getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
        for request, answer in zip(requests, answered, strict=True):
            request.resps = [answer]
        task.apply_filters()
        answers += answered
        name = task._filters[0].name
        documents: dict[int, list[Any]] = {}
        for request in requests:
            documents.setdefault(request.doc_id, []).append(request)
        for _, asked in sorted(documents.items()):
            filtered = [request.filtered_resps[name] for request in asked]
            scores.append(task.process_results(asked[0].doc, filtered))
    return answers, scores


def equal_to_lm_eval(items: list[Item], tasks: list[Any], model: Any, tokenizer: Any) -> Any:
    """Hold log-likelihoods and scores against lm-eval's; the reading."""
    answers, scores = by_lm_eval(tasks, model, tokenizer)
    (reading,) = read_probes(model, tokenizer, items, 0)
    metric = (
        {
            "characters": "acc_norm",
            "none": "acc",
        }[items[0].norm]
        if items[0].kind == "choice"
        else {"exact": "exact_match", "cloze": "acc"}[items[0].kind]
    )
    assert [score[metric] for score in scores] == list(reading.items.values())
    if items[0].kind == "exact":
        assert list(reading.answers.values()) == answers
        return reading
    encoded = encode_items(tokenizer, items, model.config)
    ours = [
        answer
        for found in likelihoods(model, [q for some in encoded for q in some])  # type: ignore[misc]
        for answer in found
    ]
    assert [one.logp for one in ours] == pytest.approx([logp for logp, _ in answers], abs=1e-4)
    assert [one.greedy for one in ours] == [greedy for _, greedy in answers]
    return reading


CASES = [
    ("mmlu_virology", 2),
    ("gsm8k", 2),
    ("arc_easy", 1),
    ("hellaswag", 2),
    ("lambada_openai", 0),
    ("blimp_adjunct_island", 0),
    ("winogrande", 0),
]


@pytest.mark.parametrize(("task", "shots"), CASES)
def test_items_read_as_lm_eval_reads_its_task(
    task: str, shots: int, pair: Any, tmp_path: Path
) -> None:
    file = tiny.jsonl(tmp_path / "rows.jsonl", rows(task))
    how = Frozen(count=6, seed=3, shots=shots, data=(str(file),))
    items, tasks = frozen(task, how)
    if task == "gsm8k":
        items = [item.model_copy(update={"max_new_tokens": 24}) for item in items]
        for request in tasks[0].instances:
            request.args[1]["max_gen_toks"] = 24
    stored = load_items([str(write_items(tmp_path / "items.jsonl", items))])
    assert [i.model_dump() for i in stored] == [i.model_dump() for i in items]
    assert len(items) == 6
    reading = equal_to_lm_eval(stored, tasks, *pair)
    assert (reading.n, reading.name) == (6, task)


def test_a_group_is_sampled_over_its_tasks(tmp_path: Path) -> None:
    """Each row goes to the task of its subject; the examples come from a file of their own."""
    questions = tiny.jsonl(tmp_path / "test.jsonl", rows("mmlu_virology"))
    shown = [row | {"question": f"shown {row['question']}"} for row in rows("mmlu_virology")]
    examples = tiny.jsonl(tmp_path / "dev.jsonl", shown)
    data = (f"test={questions}", f"dev={examples}")
    items, tasks = frozen("mmlu", Frozen(count=9, shots=2, data=data))
    assert {task.task_name for task in tasks} == {"mmlu_virology", "mmlu_anatomy"}
    assert len({item.id for item in items}) == 9
    assert {item.probe for item in items} == {"mmlu"}
    for item in items:
        subject = "virology" if "virology" in item.id else "anatomy"
        assert isinstance(item.prompt, str)
        assert f"about {subject}" in item.prompt
        assert item.prompt.count("shown") == 2
    again, _ = frozen("mmlu", Frozen(count=9, shots=2, data=data))
    assert again == items
    other, _ = frozen("mmlu", Frozen(count=9, seed=1, shots=2, data=data))
    assert [item.id for item in other] != [item.id for item in items]


def test_examples_are_set_aside_from_the_one_file(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "rows.jsonl", rows("gsm8k"))
    items = import_task("gsm8k", Frozen(count=99, shots=3, data=(str(file),)))
    asked = {str(item.prompt).rpartition("Question: ")[2] for item in items}
    shown = {
        question.partition("\n")[0]
        for item in items
        for question in str(item.prompt).split("Question: ")[1:-1]
    }
    assert (len(items), len(shown)) == (8, 4)
    assert not {question.partition("\n")[0] for question in asked} & shown


def test_another_filter_can_be_asked_for(tmp_path: Path) -> None:
    file = tiny.jsonl(tmp_path / "rows.jsonl", rows("gsm8k"))
    how = Frozen(count=1, shots=0, data=(str(file),), filter="flexible-extract", chat=True)
    (item,) = import_task("gsm8k", how)
    assert item.extract is not None
    assert not isinstance(item.extract, str)
    assert (item.extract.select, item.extract.pattern) == (-1, "(-?[$0-9.,]{2,})|(-?[0-9]+)")
    assert isinstance(item.prompt, list)
    with pytest.raises(
        RequestError, match=r"--filter: .* none called 'nice'; it has: strict-match"
    ):
        import_task("gsm8k", Frozen(data=(str(file),), filter="nice"))


PROBLEMS: list[tuple[str, dict[str, Any], list[dict[str, Any]] | None, str]] = [
    ("gsm9k", {}, None, "no task 'gsm9k'; did you mean gsm8k"),
    ("gsm8k", {}, None, "data of 'gsm8k' cannot be had .* --data test.jsonl"),
    ("gsm8k", {"shots": 12}, rows("gsm8k"), "12 rows of 'gsm8k' cannot spare 13"),
    ("gsm8k", {"shots": 0}, [{"text": "a"}], "not what task 'gsm8k' reads"),
    ("mmlu", {}, [{"subject": "cooking", "question": "?"}], "hold no row of 'mmlu'"),
    ("truthfulqa_mc2", {}, rows("truthfulqa"), "mc2' scores .* in Python of its own"),
]


@pytest.mark.parametrize(("task", "how", "given", "said"), PROBLEMS)
def test_what_cannot_be_frozen_is_named(
    task: str, how: dict[str, Any], given: Any, said: str, tmp_path: Path
) -> None:
    data = (str(tiny.jsonl(tmp_path / "rows.jsonl", given)),) if given is not None else ()
    with pytest.raises(RequestError, match=said):
        import_task(task, Frozen(**how, data=data))


def test_a_missing_or_torn_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        import_task("gsm8k", Frozen(data=(str(tmp_path / "none.jsonl"),)))
    torn = tmp_path / "torn.jsonl"
    torn.write_text("{\n")
    with pytest.raises(RequestError, match=r"torn.jsonl line 1: is not JSON"):
        import_task("gsm8k", Frozen(data=(str(torn),)))


@pytest.mark.parametrize("name", ["stories260K", "realtext4m"])
def test_real_models_on_real_sets_read_as_in_lm_eval(name: str) -> None:
    folder, sets = SHARED / "models" / name, SHARED / "data" / "benchmarks"
    if not folder.is_dir() or not sets.is_dir():
        pytest.skip("the shared checkpoints and sets are not here")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for task, file in {"blimp": "blimp_67x60", "lambada_openai": "lambada_1000"}.items():
        how = Frozen(count=12, seed=1, data=(str(sets / f"{file}.jsonl"),))
        items, tasks = frozen(task, how)
        assert len(items) == 12
        equal_to_lm_eval(items, tasks, model, tokenizer)
