"""The model card: README.md with the verdict in its metadata, in the Hub's format."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from holdfast.files import write_text
from holdfast.gate.render import escape_markdown
from holdfast.gate.verdict import GateResult, Row
from holdfast.report.data import ReportData, duration, flat, plain, show

__all__ = ["ReportData", "write_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def write_card(run_dir: Path, data: ReportData, base_model: str) -> Path:
    """Write `README.md` into the run folder.

    Args:
        run_dir: holds `model/` if whole weights were trained; otherwise `adapter/` is assumed.
        data: the run.
        base_model: Hub id or folder of the base. A folder is named in the text by its last part
            only, and stays out of the metadata, where the Hub takes nothing but ids.
    """
    whole = (run_dir / "model").is_dir()
    body = _body(data, base_model, whole)
    return write_text(run_dir / "README.md", f"---\n{_front(data, base_model, whole)}---\n{body}")


def _front(data: ReportData, base_model: str, whole: bool) -> str:
    """The YAML front matter; nothing in it depends on the day."""
    from huggingface_hub import ModelCardData

    result = data.verdict
    compared = [row for row in result.rows if row.n and row.meter != "margin"] if result else []
    card = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=["holdfast"],
        model_name=data.title if compared else None,
        eval_results=[_eval_result(row) for row in compared] or None,
        holdfast=_block(result),
    )
    return str(card.to_yaml()).rstrip("\n") + "\n"


def _eval_result(row: Row) -> Any:
    """One capability for the Hub's model-index: the tuned value, the base's beside it."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=f"{row.meter}/{row.name}",  # rows of one type would be merged
        dataset_name=row.name,
        dataset_split="sealed",
        metric_type="accuracy" if row.unit == "accuracy" else "loss",
        metric_name=f"{row.unit} after fine-tuning",
        metric_value=_number(row.after),
        metric_args={"before": _number(row.before), "change": _number(row.difference)},
    )


def _block(result: GateResult | None) -> dict[str, Any]:
    """The `holdfast:` key: verdict and what it rests on, for machines."""
    if result is None:
        return {"verdict": None}
    return {
        "verdict": str(result.verdict),
        "alpha": result.alpha,
        "capabilities": [
            {
                "name": row.name,
                "kind": row.kind,
                "verdict": str(row.verdict),
                "decisive": row.decisive,
                "unit": row.unit,
                "n": row.n,
                "before": _number(row.before),
                "after": _number(row.after),
                "change_bounds": [_number(row.lower), _number(row.upper)],
                "margin": row.margin_text or None,
            }
            for row in result.rows
        ],
    }


def _body(data: ReportData, base_model: str, whole: bool) -> str:
    """The text below the front matter."""
    name = base_model if _is_hub_id(base_model) else Path(base_model).name
    verdict = (
        data.verdict.markdown()
        if data.verdict
        else "No gate ran: nothing is promised about what this model forgot.\n"
    )
    parts = [
        f"# {escape_markdown(data.title)}\n",
        f"Fine-tuned from {escape_markdown(name)} with holdfast, which compares the tuned model "
        "with its base on held-out items, capability by capability.\n",
        "## What it kept\n",
        verdict,
        "## How it was trained\n",
        _trained(data),
        "The resolved recipe, with every lever's settings:\n",
        _fenced(yaml.safe_dump(plain(data.recipe), sort_keys=False, allow_unicode=True), "yaml"),
        "## How to load it\n",
        _fenced(_snippet(name, whole), "python"),
    ]
    return "\n" + "\n".join(parts)


def _trained(data: ReportData) -> str:
    """Facts and streams as lists."""
    lines = []
    if (seconds := data.summary.get("seconds")) is not None:
        lines.append(f"- took {duration(float(seconds))}")
    if "refused_steps" in data.summary:
        lines.append(f"- refused steps: {len(data.refused_steps())}")
    shown = {k: v for k, v in data.summary.items() if k not in ("seconds", "refused_steps")}
    lines += [f"- {_words(key)}: {escape_markdown(value)}" for key, value in flat(shown)]
    for name, row in data.stream_rows():
        told = ", ".join(f"{_words(key)} {escape_markdown(show(v))}" for key, v in row.items())
        lines.append(f"- stream {escape_markdown(name)}: {told}")
    return "\n".join(lines) + "\n" if lines else ""


def _snippet(name: str, whole: bool) -> str:
    """Code that loads the artifact with nothing of holdfast."""
    if whole:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("model")  # the folder beside this card\n'
            'tokenizer = AutoTokenizer.from_pretrained("model")\n'
        )
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
        'model = PeftModel.from_pretrained(base, "adapter")  # the folder beside this card\n'
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n"
    )


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _words(key: str) -> str:
    return escape_markdown(key.replace("_", " "))


def _is_hub_id(base_model: str) -> bool:
    """`gpt2` or `org/name`, and no folder of that name here."""
    return bool(_HUB_ID.fullmatch(base_model)) and not Path(base_model).exists()


def _number(value: float) -> float | None:
    """Rounded for reading; None where there is no finite number."""
    return round(value, 6) if math.isfinite(value) else None
