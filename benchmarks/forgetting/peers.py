"""Peers, each through its own package and as its documentation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from arms import LESSON

COMMON: dict[str, Any] = {
    "bf16": torch.cuda.is_available(),
    "use_cpu": not torch.cuda.is_available(),
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
}
"""What has nothing to do with how a peer trains."""


def trl_lora(base: str, lesson: Path, out: Path, rate: float, steps: int, seed: int) -> str:
    """`trl.SFTTrainer` with a LoRA on all linear layers; the folder of the merged model."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_dataset("json", data_files=str(lesson), split="train")
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    batch = max(1, round(LESSON * len(lengths) / sum(lengths)))
    config = SFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        max_length=256,
        completion_only_loss=True,
        gradient_checkpointing=False,
        seed=seed,
        data_seed=seed,
        **COMMON,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
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
    rows = rows.rename_column("completion", "privileged_context")
    config: Any = SDFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        max_completion_length=32,
        seed=seed,
        **COMMON,
    )
    trainer = SDFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    return str(out / "model")


PEERS = {"trl-lora": trl_lora, "trl-sdft": trl_sdft}
