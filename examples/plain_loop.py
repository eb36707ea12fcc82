"""The bare five-lever loop: replay, KL anchor, adapter, budget and gate; torch, transformers, peft.

    python examples/plain_loop.py MODEL LESSON.jsonl --replay OLD_TEXT.jsonl --out adapter/

What holdfast does at each step, without what it adds: packing, accumulation, chunked losses,
checkpoints, probes. `tests/test_plain_loop.py` holds that both reach the same weights.
A row is (ids, learned): its tokens, and for each whether predicting it is learned.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

Row = tuple[list[int], list[bool]]
Batch = dict[str, Tensor]


def read_rows(path: Path, tokenizer: Any, longest: int) -> list[Row]:
    """Rows of prompt + completion, of which the completion is learned, or of text: all of it."""
    rows = []
    for fields in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        text = fields["completion"] if "completion" in fields else fields["text"]
        given = tokenizer.encode(fields.get("prompt", ""), add_special_tokens=False)
        given = [t for t in (tokenizer.bos_token_id,) if t is not None] + given
        asked = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        learned = [False] * len(given) + [True] * len(asked)
        rows.append(((given + asked)[:longest], learned[:longest]))
    return [row for row in rows if any(row[1][1:])]


def sample(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[Row]:
    """Text the base writes itself from its start token, at temperature 1, nothing cut off."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = torch.full((count, 1), start, device=model.device)
    model.generation_config = GenerationConfig()  # a top_p of its own would bend the distribution
    written = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=length, eos_token_id=end, pad_token_id=end
        ),
    )[:, 1:].tolist()
    rows = [ids[: ids.index(end) + 1] if end in ids else ids for ids in written]
    return [([start, *ids], [False] + [True] * len(ids)) for ids in rows]


def pad(rows: Sequence[Row]) -> Batch:
    """Rows side by side, filled up on the right; labels are -100 where nothing is learned."""
    width = max(len(ids) for ids, _ in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, learned in rows:
        labels = [token if ok else -100 for token, ok in zip(ids, learned, strict=True)]
        gap = width - len(ids)
        batch["input_ids"].append(ids + [0] * gap)
        batch["attention_mask"].append([1] * len(ids) + [0] * gap)
        batch["labels"].append(labels + [-100] * gap)
    return {name: torch.tensor(lists) for name, lists in batch.items()}


def learned_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (N, V) wherever the next token is learned, and that token (N,)."""
    ids, mask, labels = (tensor.to(model.device) for tensor in batch.values())
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return logits[labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100]


def mean_nll(model: Any, batch: Batch) -> Tensor:
    """Next-token loss, in nats a token."""
    return cross_entropy(*learned_logits(model, batch))


def mean_kl(model: Any, batch: Batch) -> Tensor:
    """KL(base || tuned), in nats a token; the base is the model with its adapter off."""
    with torch.no_grad(), model.disable_adapter():
        base = learned_logits(model, batch)[0].log_softmax(-1)
    tuned = learned_logits(model, batch)[0].log_softmax(-1)
    return kl_div(tuned, base, reduction="batchmean", log_target=True)


def loss_of_step(
    model: Any, lesson: Batch, anchor: Batch, kl_weight: float, ntp: tuple[float, Batch] | None
) -> tuple[Tensor, dict[str, float]]:
    """The lesson's loss, the pull to the base on anchor rows, and next-token loss on old rows."""
    task, kl = mean_nll(model, lesson), mean_kl(model, anchor)
    loss = task + kl_weight * kl
    parts = {"task": task.item(), "kl": kl.item()}
    if ntp is not None:
        weight, replay = ntp
        old = mean_nll(model, replay)
        loss, parts["replay"] = loss + weight * old, old.item()
    return loss, parts | {"loss": loss.item()}


def train(
    model: Any,
    steps: Sequence[tuple[Batch, Batch, tuple[float, Batch] | None]],
    kl_weight: float,
    peak: float,
    warmup: int,
    clip: float,
) -> Iterator[dict[str, float]]:
    """One optimizer step for each (lesson, anchor, ntp), and what each came to."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    model.eval()  # dropout would read as divergence from the base
    for step, (lesson, anchor, ntp) in enumerate(steps):
        fall = (step - warmup) / (len(steps) - warmup)
        rate = peak * (step / warmup if step < warmup else 1 - fall)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss, parts = loss_of_step(model, lesson, anchor, kl_weight, ntp)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip).item()
        refused = not math.isfinite(norm)
        if not refused:
            optimizer.step()
        facts = {"learning_rate": rate, "grad_norm": norm, "moved": displacement(model)}
        yield parts | facts | {"refused": float(refused)}


def displacement(model: Any) -> float:
    """||W - W0|| / ||W0|| over the adapted matrices: the norms of the LoRA products s B A."""
    pairs = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    moved = math.hypot(*(pair.get_delta_weight("default").norm().item() for pair in pairs))
    return moved / math.hypot(*(pair.get_base_layer().weight.norm().item() for pair in pairs))


@torch.no_grad()
def read_canary(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean loss of each held-out text."""
    return torch.tensor([mean_nll(model, pad([row])).item() for row in rows])


def gate(before: Tensor, after: Tensor, margin: float) -> str:
    """PASS if the rise is below the margin at 95 % confidence: not merely unproven."""
    rise, error = (after - before).mean(), (after - before).std() / len(before) ** 0.5
    passes, fails = rise + 1.645 * error <= margin, rise - 1.645 * error > margin
    verdict = "PASS" if passes else "FAIL" if fails else "INCONCLUSIVE"
    return f"{verdict}: canary loss rose by {rise:.4f} +- {error:.4f} nats (margin {margin})"


def add_lora(model: Any, r: int) -> Any:
    """LoRA on the MLP of a Llama-like model, alpha 2 r."""
    mlp = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=mlp, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def main() -> None:
    """Train, and print the verdict."""
    parser = argparse.ArgumentParser(description="The bare five-lever loop.")
    parser.add_argument("model", help="folder or hub id of the base")
    parser.add_argument("lesson", type=Path, help="JSONL with prompt and completion")
    parser.add_argument("--replay", type=Path, help="JSONL with text of the base's kind")
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    for name, value in {"steps": 200, "rows": 16, "r": 16, "length": 128, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in {"kl-weight": 10.0, "clip": 1.0, "margin": 0.05}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    asked = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    lesson = read_rows(asked.lesson, tokenizer, asked.length)
    anchors = sample(model, tokenizer, 8 * asked.rows, asked.length - 1, asked.seed)
    if asked.replay:  # by KL: as next-token loss it is right for the base's own data alone
        anchors += read_rows(asked.replay, tokenizer, asked.length)
    canary = sample(model, tokenizer, 64, asked.length - 1, asked.seed + 1)
    canary = [row for row in canary if row not in anchors]
    before = read_canary(model, canary)

    draw = random.Random(asked.seed)
    a_third = max(1, asked.rows // 3)
    steps = [
        (pad(draw.choices(lesson, k=asked.rows)), pad(draw.choices(anchors, k=a_third)), None)
        for _ in range(asked.steps)
    ]
    model = add_lora(model, asked.r)
    peak, warmup = 5e-4 * (2000 / model.config.hidden_size) ** 0.781, math.ceil(asked.steps / 20)
    log = train(model, steps, asked.kl_weight, peak, warmup, asked.clip)
    for step, facts in enumerate(log, 1):
        if step == 1 or step % max(1, asked.steps // 10) == 0:
            print(f"step {step:4}", *(f"{name} {value:.4g}" for name, value in facts.items()))
    if asked.out:
        model.save_pretrained(asked.out)
    print(gate(before, read_canary(model, canary), asked.margin))


if __name__ == "__main__":
    main()
