"""Cells of a benchmark: JSON lines, several trained at once, a file that is continued.

A cell is a dict that names what is to be run; a line is the cell and what came of it. A line is
written when its cell is done, and a cell that has a line is not run again: whoever calls `fill`
says in `missing` which are left. A file named `.gz` is compressed, a member a line.
"""

from __future__ import annotations

import gzip
import json
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def read(path: Path) -> list[Cell]:
    """The lines of a file; none where there is no file yet."""
    if not path.is_file():
        return []
    held = path.read_bytes()
    text = (gzip.decompress(held) if path.suffix == ".gz" else held).decode()
    return [json.loads(line) for line in text.splitlines()]


def append(path: Path, lines: Iterable[Cell]) -> None:
    """Write lines at the end of a file."""
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with path.open("ab") as file:
        file.write(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def fill(
    path: Path,
    missing: Callable[[list[Cell]], Iterable[Cell]],
    run: Callable[[Cell], list[Cell]],
    told: Callable[[Cell], str],
    *,
    jobs: int = 1,
    minutes: float = 1e9,
    fresh: bool = False,
) -> list[Cell]:
    """Run what is missing, `jobs` at once, each in a process with one CPU thread; every line.

    Args:
        missing: cells that can be run now, given the lines so far, the most urgent first.
        run: the lines of a cell without the cell; a module's own function, for it is sent over.
        told: what to print of a line.
        minutes: no cell is begun after that.
        fresh: a process runs one cell and ends, so that the memory it took is the cell's.
    """
    done, running, stop = read(path), {}, time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(
        jobs,
        get_context("spawn"),
        initializer=_one_thread,
        max_tasks_per_child=1 if fresh else None,
    ) as pool:
        while True:
            busy = list(running.values())
            for cell in missing(done) if time.monotonic() < stop else ():
                if len(running) == jobs:
                    break
                if cell not in busy:
                    busy.append(cell)
                    running[pool.submit(_line, run, cell)] = cell
            if not running:
                return done
            ready: set[Future[list[Cell]]] = wait(running, return_when=FIRST_COMPLETED).done
            for future in ready:
                cell = running.pop(future)
                lines = [cell | line for line in future.result()]
                done += lines
                append(path, lines)
                print(cell, told(lines[0]) if "failed" not in lines[0] else lines[0]["failed"],
                      flush=True)  # fmt: skip


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _line(run: Callable[[Cell], list[Cell]], cell: Cell) -> list[Cell]:
    """What came of a cell; what it said last where it failed."""
    try:
        return run(cell)
    except Exception as error:  # a cell that cannot be run is a result, too
        traceback.print_exc()
        said = str(error).strip().splitlines() or ["no word of why"]
        return [{"failed": f"{type(error).__name__}: {said[-1][:300]}"}]
