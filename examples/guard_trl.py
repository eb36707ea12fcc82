"""A guard around trl's SFTTrainer: what was forgotten, measured while another tool trains.

    python examples/guard_trl.py MODEL LESSON.jsonl --canary OLD_TEXT.jsonl --probes PROBES.jsonl

The same two lines (make the guard, add it as a callback) serve DPOTrainer, GRPOTrainer and
transformers' own Trainer. `tests/test_guard_example.py` runs this file.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from holdfast import Guard


def main(words: list[str]) -> int:
    """Train, print the verdict, and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("lesson", help="JSONL rows of prompt + completion, or messages")
    parser.add_argument("--canary", required=True, help="held-out text of the base's kind")
    parser.add_argument("--probes", required=True, help="items, as docs/probes.md has them")
    parser.add_argument("--out", type=Path, default=Path("runs/guarded"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(words)

    guard = Guard(
        canary=args.canary,
        probes=args.probes,
        every=max(1, args.steps // 5),
        out=str(args.out / "guard"),
    )
    trainer = SFTTrainer(
        # in what it is kept in, float16 perhaps, nothing would be learned on a CPU
        AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32
        ),
        SFTConfig(
            output_dir=str(args.out / "checkpoints"),
            max_steps=args.steps,
            learning_rate=2e-4,
            max_length=1024,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=args.lesson, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[guard],
    )
    trainer.train()
    trainer.save_model(str(args.out / "adapter"))
    assert guard.verdict is not None
    print(guard.verdict.markdown())
    print(f"report: {guard.folder / 'report.html'}")
    return guard.verdict.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
