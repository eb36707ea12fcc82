"""Interrupt a run at ten random steps with SIGKILL, resume it, and compare with an undisturbed one.

Every run ends with the same weights, bit for bit, and holds every reading exactly once.

    python benchmarks/resume.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from holdfast.lab import base_path, write_files


def command(folder: Path, files: dict[str, Path], *extra: str) -> list[str]:
    """The run that is interrupted: small, with a checkpoint every third step."""
    return [
        str(Path(sys.executable).parent / "holdfast"),
        "train",
        f"--model={base_path()}",
        f"--data={files['lesson']}",
        f"--out={folder}",
        f"canary.sources=[{files['canary']}]",
        "canary.max_documents=8",
        "train.steps=30",
        "train.batch_tokens=512",
        "train.save_every=3",
        "train.measure_every=4",
        "alarms.every=4",
        "levers.kl_anchor.self_generated.rows=32",
        *extra,
    ]


def run(words: list[str]) -> None:
    """Run to the end; the gate's verdict does not matter here."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode not in (0, 3, 4):
        raise SystemExit(f"exit code {done.returncode}: {done.stderr}")


def kill_at(words: list[str], folder: Path, step: int) -> int:
    """Start, kill when the readings have reached `step`, and return the last step read."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    reached = 0
    while process.poll() is None and reached < step:
        time.sleep(0.005)
        reached = max([r["step"] for r in readings(folder)], default=0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return max([r["step"] for r in readings(folder)], default=0)


def readings(folder: Path) -> list[dict[str, object]]:
    """Whole lines of readings.jsonl."""
    path = folder / "readings.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def digest(folder: Path) -> str:
    """SHA-256 of the artifact's weights, an adapter's or a whole model's."""
    (weights,) = [
        path for kind in ("adapter", "model") for path in folder.glob(f"{kind}/*.safetensors")
    ]
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def keys(folder: Path) -> Counter[tuple[object, ...]]:
    """How often each reading is there."""
    return Counter((r["step"], r["meter"], r["name"], r["split"]) for r in readings(folder))


def main(times: int = 10, seed: int = 0) -> None:
    """Print one line an interruption, and what differed in total."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    differing = 0
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch) / "data")
        whole = Path(scratch) / "whole"
        run(command(whole, files))
        for number, step in enumerate(random.Random(seed).sample(range(1, 30), times)):
            folder = Path(scratch) / f"killed{number}"
            words = command(folder, files)
            reached = kill_at(words, folder, step)
            run([*words, "--resume"])
            same = digest(folder) == digest(whole)
            once = keys(folder) == keys(whole) and set(keys(folder).values()) == {1}
            differing += not (same and once)
            print(
                f"killed after step {reached:2}: weights {'identical' if same else 'DIFFER'}, "
                f"readings {'each once' if once else 'DIFFER'}",
                flush=True,
            )
    print(f"{times - differing} of {times} interrupted runs ended bit-identical")
    raise SystemExit(differing > 0)


if __name__ == "__main__":
    typer.run(main)
