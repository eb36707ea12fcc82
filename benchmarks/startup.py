"""Seconds that `holdfast --help` and `holdfast validate` take, as whole processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from holdfast.lab import base_path, write_files

ROUNDS = 11


def seconds(*words: str) -> list[float]:
    """Wall time of each round; the process must succeed."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run([Path(sys.executable).parent / "holdfast", *words], check=True, stdout=-3)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    """Print minimum, median and maximum of each command, and of Python doing nothing."""
    with TemporaryDirectory() as scratch:
        files = write_files(Path(scratch))
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "model": str(base_path()),
                    "data": str(files["lesson"]),
                    "probes": str(files["probes"]),
                    "canary": {"sources": [str(files["canary"])]},
                    "out": str(Path(scratch) / "run"),
                }
            )
        )
        for words, limit in (
            (("--help",), 0.3),
            (("validate", str(recipe)), 1.0),
            (("schema",), 1.0),
        ):
            times = seconds(*words)
            print(
                f"holdfast {words[0]:9} min {min(times):.3f}  median {statistics.median(times):.3f}"
                f"  max {max(times):.3f} s   aim {limit} s   ({ROUNDS} rounds)"
            )


if __name__ == "__main__":
    main()
