"""Items a second of the probe engine beside lm-eval's HF backend, on the same items and model.

Both answer the same items in turns in one process, so that whatever else the machine does falls
on both; each has its own tokenization in its time. Both have one batch budget: lm-eval's rows are
as many as `tokens // longest request`, our batches hold `tokens`, and generation has as many
rows side by side as lm-eval. Their answers are compared before the figure is printed.

    python benchmarks/probes.py --model PATH     # default: realtext4m, read beyond its own context

Needs the `eval` extra and local data: MMLU with choices of one letter (a sample over all subjects,
and some subjects whole, as a reading of all items has them), the same as choices of whole answers,
and GSM8K with shared and with drawn examples.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from holdfast import decode
from holdfast.meters import importing
from holdfast.meters.importing import Frozen, import_task
from holdfast.meters.probes import Item, read_probes
from holdfast.model import Model, load_model, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
SETS = SHARED / "data" / "benchmarks"
MMLU = (f"test={SETS / 'mmlu_test_1000.jsonl'}", f"dev={SETS / 'mmlu_dev.jsonl'}")
GSM8K = (str(SETS / "gsm8k_test_400.jsonl"),)


def tasks_alone(*folders: str) -> None:
    """Let lm-eval read the definitions of these tasks, not of all 14,000."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    paths: list[str | Path] = [root / folder for folder in folders]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)
    importing._manager = lambda: manager


def fitting(items: list[Item], tokenizer: Any, context: int) -> list[Item]:
    """Items with room to answer: lm-eval would cut the others."""
    return [i for i in items if len(tokenizer(str(i.prompt))["input_ids"]) < context - 160]


def whole_answers(items: list[Item]) -> list[Item]:
    """MMLU's items with the four answers themselves as choices, not their letters."""
    found = []
    for item in items:
        lines = str(item.prompt).splitlines()[-5:-1]
        choices = [line[3:].strip() for line in lines]
        if all(choices) and len({*choices}) == 4 and lines[0].startswith("A. "):
            found.append(item.model_copy(update={"choices": choices}))
    return found


def as_requests(items: list[Item]) -> list[Any]:
    """The requests that lm-eval makes of such items."""
    from lm_eval.api.instance import Instance

    if items[0].kind == "exact":
        kwargs = {"until": items[0].stop, "max_gen_toks": items[0].max_new_tokens}
        kwargs |= {"do_sample": False, "temperature": 0.0}
        return [
            Instance("generate_until", {}, (str(item.prompt), dict(kwargs)), i)
            for i, item in enumerate(items)
        ]
    return [
        Instance("loglikelihood", {}, (str(item.prompt), f"{item.delimiter}{choice}"), 0)
        for item in items
        for choice in item.choices or ()
    ]


def theirs(lm: Any, items: list[Item], requests: list[Any]) -> list[str]:
    """lm-eval's answer to each item: its text, or the likeliest choice."""
    answers = getattr(lm, requests[0].request_type)(requests, disable_tqdm=True)
    if items[0].kind == "exact":
        return list(answers)
    logps = iter(answers)
    found = []
    for item in items:
        choices = item.choices or []
        scores = [next(logps)[0] for _ in choices]
        found.append(choices[max(range(len(scores)), key=scores.__getitem__)])
    return found


def compare(name: str, lm: Any, items: list[Item], tokens: int, rounds: int, aim: float) -> None:
    """Print one kind of item's figures."""
    model, tokenizer = lm.model, lm.tokenizer
    extra = items[0].max_new_tokens if items[0].kind == "exact" else 0
    longest = max(len(tokenizer(str(item.prompt))["input_ids"]) for item in items) + extra
    rows = max(1, tokens // longest)
    lm.batch_size_per_gpu = rows
    decode.MOST_SLOTS = rows
    requests = as_requests(items)
    ways: dict[str, Callable[[], list[str]]] = {
        "holdfast": lambda: list(read_probes(model, tokenizer, items, 0)[0].answers.values()),
        "lm-eval": lambda: theirs(lm, items, requests),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for way, ask in ways.items():
            begun = time.perf_counter()
            answers[way] = ask()
            speeds[way].append(len(items) / (time.perf_counter() - begun))
    same = sum(a == b for a, b in zip(answers["holdfast"], answers["lm-eval"], strict=True))
    ours, lm_eval = (statistics.median(speeds[way]) for way in ways)
    ratio = ours / lm_eval
    print(
        f"{name}: {len(items)} items, longest {longest} tokens, lm-eval batch {rows}: "
        f"holdfast {ours:.2f} items/s, lm-eval {lm_eval:.2f}; same answer on {same} of "
        f"{len(items)}; ratio {ratio:.2f}, aim {aim:g}: {'met' if ratio >= aim else 'MISSED'}",
        flush=True,
    )


def main(
    model: str = str(SHARED / "models" / "realtext4m"),
    items: Annotated[int, typer.Option("--items", help="Written; of choices more.")] = 40,
    tokens: Annotated[int, typer.Option(help="Batch budget: padded tokens.")] = 8192,
    length: Annotated[int, typer.Option(help="Longest written answer.")] = 64,
    context: Annotated[
        int, typer.Option(help="Read the model as if it had such a context.")
    ] = 4096,
    rounds: int = 2,
    threads: int = 1,
) -> None:
    """Alternate the two on each kind of item and print their medians."""
    from lm_eval.models.huggingface import HFLM

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    settings = Model(path=model, dtype="float32")
    tokenizer = load_tokenizer(settings)
    lm = load_model(settings, adapter=False, tokenizer=tokenizer).eval()
    lm.config.max_position_embeddings = context
    lm.to("cuda" if torch.cuda.is_available() else "cpu")
    backend = HFLM(pretrained=lm, tokenizer=tokenizer, batch_size=1, max_length=context)
    tasks_alone("mmlu/default", "gsm8k")
    print(f"{Path(model).name}, {threads} thread(s), {rounds} rounds, {tokens} tokens a batch")

    def mmlu(count: int) -> list[Item]:
        drawn = import_task("mmlu", Frozen(count, shots=5, data=MMLU))
        return fitting(drawn, tokenizer, context)

    drawn, whole = mmlu(5 * items), mmlu(1000)[: 5 * items]  # in the order of their subjects
    compare("MMLU, 5 shots, letters, drawn", backend, drawn, tokens, rounds, 3)
    compare("MMLU, 5 shots, letters, whole subjects", backend, whole, tokens, rounds, 3)
    compare("MMLU, 5 shots, answers", backend, whole_answers(drawn)[:items], tokens, rounds, 3)
    # gsm8k_cot shows each item the same 8 examples; gsm8k draws 5 for each, so nothing is shared
    for task, shots in (("gsm8k_cot", "the same 8 shots"), ("gsm8k", "5 shots of their own")):
        sums = import_task(task, Frozen(items, data=GSM8K))
        sums = [item.model_copy(update={"max_new_tokens": length}) for item in sums]
        sums = fitting(sums, tokenizer, context)
        compare(f"GSM8K, {shots}, written", backend, sums, tokens, rounds, 2)


if __name__ == "__main__":
    typer.run(main)
