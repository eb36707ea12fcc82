"""Freezing a sample of an lm-eval task: its prompts as rendered by its own code, few-shot included.

What a task says of scoring becomes fields of the items (docs/probes.md), so that a reading equals
lm-eval's, item by item. A task that scores in Python of its own is refused rather than guessed at.
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from holdfast.errors import RequestError
from holdfast.meters.probes.items import Compare, Extract, Item, Tag
from holdfast.meters.probes.local import SUBJECTS, read_rows, splits_of


@dataclass(frozen=True)
class Frozen:
    """What is to be frozen, and how."""

    count: int = 200
    seed: int = 0
    shots: int | None = None
    """Examples before each question; None: as the task has it."""
    data: tuple[str, ...] = ()
    """Local files or folders, `SPLIT=PATH` or the split that is asked of; none: the hub."""
    probe: str | None = None
    """Name of the probe; None: that of the task."""
    tags: tuple[Tag, ...] = ("guardrail",)
    filter: str | None = None
    """Which of the task's filters; None: its first."""
    chat: bool = False
    """The prompt as one message of a user, for the model's chat template."""


def import_task(name: str, how: Frozen, also: Iterable[str] = ()) -> list[Item]:
    """A sample of an lm-eval task, group or tag, drawn without replacement, in the data's order.

    Args:
        name: as lm-eval has it.
        how: size of the sample, seed, few-shot examples, where the data is.
        also: names that are known besides lm-eval's, for a mistyped one.

    Raises:
        RequestError: lm-eval is not installed, does not know the task, or its data cannot be had;
            the task's scoring is none that an item can say.
    """
    tasks = _load(name, how, also)
    pool = [(task, i) for task in tasks for i in range(len(task.eval_docs))]
    chosen = random.Random(how.seed).sample(range(len(pool)), min(how.count, len(pool)))
    by_task: dict[str, list[int]] = {}
    for place in sorted(chosen):
        task, number = pool[place]
        by_task.setdefault(task.task_name, []).append(number)
    return [
        item
        for task in tasks
        if task.task_name in by_task
        for item in _items(task, by_task[task.task_name], how.probe or name, how)
    ]


def _manager() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RequestError(
            "probes import: this needs lm-eval; install it: pip install 'holdfast[eval]'"
        ) from None
    return TaskManager()


def _load(name: str, how: Frozen, also: Iterable[str]) -> list[Any]:
    """The tasks behind a name, with their data."""
    manager = _manager()
    if name not in manager.task_index:
        known = list(dict.fromkeys([*also, *manager.all_tasks]))
        near = get_close_matches(name, known, n=5, cutoff=0.6)
        near += [task for task in known if name in task and task not in near][: 5 - len(near)]
        hint = (
            f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks` for its names"
        )
        raise RequestError(f"probes import: lm-eval knows no task '{name}'; {hint}")
    with _quiet():
        tasks = _load_local(manager, name, how) if how.data else _load_hub(manager, name)
        for task in tasks:
            if how.shots is not None:
                task.config.num_fewshot = how.shots
            task.set_fewshot_seed(how.seed)
    return tasks


def _load_hub(manager: Any, name: str) -> list[Any]:
    try:
        return list(manager.load(name)["tasks"].values())
    except Exception as error:  # hub, network, data set scripts: whatever the task's code meets
        raise RequestError(
            f"probes import: the data of '{name}' cannot be had ({_first_line(error)}); give it as "
            "a local file with the hub's columns: --data test.jsonl, and --data train=FILE for the "
            "examples before each question"
        ) from error


def _load_local(manager: Any, name: str, how: Frozen) -> list[Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    given = read_rows(how.data)
    tasks = []
    for leaf in _leaves(manager, name):
        path = manager.task_index[leaf].yaml_path
        try:
            config = load_yaml(path, resolve_func=True) if path else {}
        except Exception as error:  # the task's own code, and what it imports
            raise RequestError(
                f"probes import: task '{leaf}' cannot be loaded ({_first_line(error)}); install "
                "what it needs, or take another"
            ) from error
        if "class" in config or not config:
            raise RequestError(
                f"probes import: task '{leaf}' loads its data in Python of its own; leave --data "
                "out, where the hub can be reached"
            )
        splits = splits_of(config, given, how.shots, how.seed)
        if not splits:
            continue  # a subject of which the files have no row
        for key in ("tag", "group"):
            config.pop(key, None)
        try:
            loaded = manager.load({**config, "custom_dataset": lambda splits=splits, **_: splits})
        except Exception as error:
            raise _unreadable(leaf, config.get("dataset_path"), error) from error
        tasks += loaded["tasks"].values()
    if not tasks:
        raise RequestError(
            f"probes import: {', '.join(how.data)} hold no row of '{name}'; rows of a group name "
            f"their task under one of: {', '.join(SUBJECTS)}"
        )
    return tasks


def _unreadable(task: str, columns_of: str | None, error: Exception) -> RequestError:
    return RequestError(
        f"probes import: the rows are not what task '{task}' reads ({_first_line(error)}); give "
        f"the columns that {columns_of} has on the hub"
    )


def _leaves(manager: Any, name: str) -> list[str]:
    """The tasks of a group or tag, in its order."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    kind = entry.kind.name
    if kind == "TAG":
        return [leaf for member in sorted(entry.tags) for leaf in _leaves(manager, member)]
    if kind != "GROUP":
        return [name]
    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg
    found = []
    for member in config.get("task") or ():
        if not isinstance(member, str) or member not in manager.task_index:
            raise RequestError(
                f"probes import: group '{name}' changes its tasks, which --data cannot follow; "
                f"give one of its tasks, such as '{member if isinstance(member, str) else name}'"
            )
        found += _leaves(manager, member)
    return found


# ---- from a task's requests to items


def _items(task: Any, numbers: list[int], probe: str, how: Frozen) -> Iterator[Item]:
    """The items of some documents."""
    _refuse_what_no_item_says(task)
    try:
        with _quiet():
            task.build_all_requests(samples=numbers)
    except Exception as error:  # templates and Python of the task's own, on rows it may not know
        raise _unreadable(task.task_name, task.config.dataset_path, error) from error
    requests: dict[int, list[Any]] = {}
    for request in task.instances:
        requests.setdefault(request.doc_id, []).append(request)
    fields = {
        "multiple_choice": _choice,
        "loglikelihood": _cloze,
        "loglikelihood_rolling": _rolling,
        "generate_until": _written,
    }[task.OUTPUT_TYPE]
    for number, (_, asked) in zip(numbers, sorted(requests.items()), strict=True):
        record = {
            "id": f"{task.task_name}-{number}",
            "probe": probe,
            "bos": "tokenizer",
            "tags": list(how.tags),
            **fields(task, asked, how),
        }
        if how.chat:
            if "prompts" in record:
                raise RequestError(f"probes import: '{task.task_name}' has no one prompt to --chat")
            record["prompt"] = [{"role": "user", "content": record["prompt"]}]
        try:
            yield Item.model_validate(record)
        except ValueError as error:
            raise RequestError(
                f"probes import: document {number} of '{task.task_name}' is no sound item "
                f"({_first_line(error)}); leave it out of the data"
            ) from error


def _refuse_what_no_item_says(task: Any) -> None:
    config = task.config
    metrics = set(task._metric_fn_list)
    known = {
        "multiple_choice": {"acc", "acc_norm", "acc_bytes"},
        "loglikelihood": {"acc"},
        "loglikelihood_rolling": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
        "generate_until": {"exact_match"},
    }.get(task.OUTPUT_TYPE, set())
    kwargs = config.generation_kwargs or {}
    if callable(config.process_results) or getattr(task, "MULTIMODAL", False):
        what = "scores its answers in Python of its own"
    elif not known & metrics:
        what = f"is scored by {', '.join(sorted(map(str, metrics)))}"
    elif kwargs.get("do_sample") or (kwargs.get("temperature") or 0) > 0 or config.repeats > 1:
        what = "samples its answers"
    else:
        return
    raise RequestError(
        f"probes import: task '{task.task_name}' {what}, which no item can say; take a task of "
        "choices, exact matches or likelihoods, or write the items by hand (docs/probes.md)"
    )


def _choice(task: Any, asked: list[Any], how: Frozen) -> dict[str, Any]:
    doc = asked[0].doc
    choices = list(task.doc_to_choice(doc))
    asked = asked[: len(choices)]  # those beyond are unconditional, for acc_mutual_info
    metrics, delimiter = task._metric_fn_list, task.config.target_delimiter
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    if not isinstance(gold, int):
        raise RequestError(
            f"probes import: task '{task.task_name}' has {gold!r} for an answer, where an item has "
            "one choice; take another task"
        )
    if task.multiple_input:
        same = task.doc_to_target(doc)
        return {
            "kind": "choice",
            "prompt": "",
            "prompts": [request.args[0] for request in asked],
            "choices": [str(same)] * len(asked),
            "delimiter": delimiter,
            "answer": gold,
            "norm": "none",
        }
    by_length = {"acc_norm": "characters", "acc_bytes": "bytes"}
    return {
        "kind": "choice",
        "prompt": asked[0].args[0],
        "choices": choices,
        "delimiter": delimiter,
        "answer": gold,
        "norm": next((norm for metric, norm in by_length.items() if metric in metrics), "none"),
    }


def _cloze(task: Any, asked: list[Any], how: Frozen) -> dict[str, Any]:
    prompt, target = asked[0].args[:2]
    return {"kind": "cloze", "prompt": prompt, "target": target}


def _rolling(task: Any, asked: list[Any], how: Frozen) -> dict[str, Any]:
    return {"kind": "nll", "prompt": "", "target": asked[0].args[0]}


def _written(task: Any, asked: list[Any], how: Frozen) -> dict[str, Any]:
    doc, (prompt, kwargs) = asked[0].doc, asked[0].args[:2]
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    elif not task.multiple_target or not isinstance(target, list):
        target = str(target)
    until = kwargs.get("until") or []
    compare = task._metric_fn_kwargs["exact_match"]
    ignored = ("ignore_case", "ignore_punctuation", "ignore_numbers")
    return {
        "kind": "exact",
        "prompt": prompt,
        "target": target,
        "stop": [s for s in ([until] if isinstance(until, str) else until) if s],
        "max_new_tokens": int(kwargs.get("max_gen_toks", 256)),  # lm-eval's own default
        "extract": _extract(task, how.filter),
        "compare": Compare(
            strip=False,
            ignore=compare.get("regexes_to_ignore") or [],
            **{name: bool(compare.get(name, False)) for name in ignored},
        ).model_dump(),
    }


def _extract(task: Any, wanted: str | None) -> dict[str, Any] | None:
    """The task's filter: one regular expression, or none."""
    filters = {one["name"]: one["filter"] for one in task.config.filter_list or ()}
    if wanted is not None and wanted not in filters:
        raise RequestError(
            f"--filter: task '{task.task_name}' has none called '{wanted}'; "
            f"it has: {', '.join(filters) or 'none'}"
        )
    name = wanted or next(iter(filters), None)
    steps = [step for step in filters.get(name, ()) if step["function"] != "take_first"]
    if not steps:
        return None
    step = steps[0]
    if len(steps) > 1 or step["function"] != "regex":
        words = ", ".join(str(step["function"]) for step in steps)
        raise RequestError(
            f"probes import: filter '{name}' of '{task.task_name}' is {words}, and an item can say "
            f"one regex; give another with --filter, of: {', '.join(filters)}"
        )
    return Extract(
        pattern=step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"),
        select=step.get("group_select", 0),
        fallback=step.get("fallback", "[invalid]"),
    ).model_dump()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and warnings of lm-eval."""
    import logging

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
