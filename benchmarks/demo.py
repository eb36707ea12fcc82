"""The demo as a user sees it: its output, its seconds, its peak memory; keeps the picture.

python benchmarks/demo.py --picture docs/demo.svg
python benchmarks/demo.py --seed 21 --seed 22 --seed 23
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from holdfast.demo import demo


def main(
    picture: Path | None = None, seed: Annotated[list[int] | None, typer.Option()] = None
) -> None:
    """Run it once a seed and say what it took; the picture is of the last."""
    for number in seed or [0]:
        console = Console(record=True, width=92)
        started = time.perf_counter()
        with TemporaryDirectory() as scratch:
            code = demo(Path(scratch) / "demo", console, seed=number)
        seconds = time.perf_counter() - started
        if picture is not None:
            console.save_svg(str(picture), title="holdfast demo", clear=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"seed {number}: exit code {code}; {seconds:.0f} s (aim 300); ", end="")
        print(f"peak memory {peak:.2f} GiB (aim 3)", flush=True)


if __name__ == "__main__":
    typer.run(main)
