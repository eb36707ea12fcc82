"""Peers, each through its own package and as its documentation says.

In float32, as holdfast trains on a CPU: transformers 5 loads a checkpoint in what it is kept in,
and in the lab's float16 most gradients are 0 and sampling ends in NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from arms import LESSON


def asked(out: Path, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """What the benchmark sets of any trainer's arguments: the rest is the peer's own."""
    return {
        "output_dir": str(out / "trainer"),
        "max_steps": steps,
        "learning_rate": rate,
        "seed": seed,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def rows_a_step(rows: Any, tokenizer: Any) -> int:
    """So many have `LESSON` tokens together, on average."""
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    return max(1, round(LESSON * len(lengths) / sum(lengths)))


def trl_lora(base: str, lesson: Path, out: Path, rate: float, steps: int, seed: int) -> str:
    """`trl.SFTTrainer` with a LoRA on all linear layers; the folder of the merged model."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_dataset("json", data_files=str(lesson), split="train")
    config = SFTConfig(
        per_device_train_batch_size=rows_a_step(rows, tokenizer),
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_length=256,
        completion_only_loss=True,
        gradient_checkpointing=False,
        data_seed=seed,
        **asked(out, rate, steps, seed),
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return str(out / "model")


def trl_sdft(base: str, lesson: Path, out: Path, rate: float, steps: int, seed: int) -> str:
    """`trl.experimental.sdft`: the teacher is the model shown the answer in context."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_dataset("json", data_files=str(lesson), split="train")
    batch = rows_a_step(rows, tokenizer)
    rows = rows.rename_column("completion", "privileged_context")
    config: Any = SDFTConfig(
        per_device_train_batch_size=batch,
        num_generations=1,  # of its eight, so that a step has as many rows as the others'
        max_completion_length=64,
        **asked(out, rate, steps, seed),
    )
    trainer = SDFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    return str(out / "model")


PEERS = {"trl-lora": trl_lora, "trl-sdft": trl_sdft}
