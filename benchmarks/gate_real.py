"""The gate on real readings: base against base, and planted damage of known size.

    python benchmarks/gate_real.py read FOLDER       # the lab's base: batches, precision, noise
    python benchmarks/gate_real.py judge FOLDER      # 1,000 gates a condition, on draws of those

`read` keeps the value of every item under every condition, a file each; what is there is not read
again, so it may be stopped (`--minutes`). `judge` needs the files only: a run of its is a draw of
items, without replacement, from those readings. Figures are worded as gate.py says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import typer

from gate import ALPHA, against, shown
from holdfast.gate.verdict import Gate, decide
from holdfast.meters import Reading

app = typer.Typer(add_completion=False)

SIZES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6)
"""Planted noise over the spread of each matrix."""
Values = dict[str, dict[str, float]]
"""unit/name -> item -> value."""


def planted(model: Any, blocks: list[int], size: float, seed: int) -> Callable[[], None]:
    """Add noise of `size` times each matrix's own spread in some blocks; returns the undoing."""
    import torch

    random = torch.Generator().manual_seed(seed)
    kept = []
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2 and any(f".layers.{b}." in name for b in blocks):
                kept.append((tensor, tensor.clone()))
                noise = torch.randn(tensor.shape, generator=random, dtype=torch.float32)
                tensor.add_((size * tensor.float().std() * noise).to(tensor.dtype))

    def undo() -> None:
        with torch.no_grad():
            for tensor, then in kept:
                tensor.copy_(then)

    return undo


def batches(tokens: int) -> None:
    """So many tokens side by side, for texts, for choices and for written answers."""
    from holdfast import decode
    from holdfast.meters import scoring
    from holdfast.meters.likelihood import likelihoods
    from holdfast.meters.probes import read

    scoring.BATCH_TOKENS = tokens
    read.likelihoods = lambda model, asked: likelihoods(model, asked, batch_tokens=tokens)
    decode.MOST_SLOTS = max(1, tokens // 64)


def lab_texts(seeds: int) -> tuple[list[Any], list[dict[str, str]]]:
    """Guardrail items and canary rows of some seeds of the lab, none twice."""
    from holdfast.gate.beforehand import content
    from holdfast.lab.files import canaries, probe_items
    from holdfast.meters.probes import Item

    items, rows = {}, {}
    for seed in range(seeds):
        for record in probe_items(seed):
            item = Item.model_validate({**record, "id": f"{seed}/{record['id']}"})
            if not {"target", "adoption", "recovery"} & set(item.tags):
                items.setdefault((item.probe, content(item)), item)
        rows |= {row.text: row._asdict() for row in canaries(seed)}
    return list(items.values()), list(rows.values())


def realtext_texts(data: Path) -> tuple[list[Any], list[dict[str, str]]]:
    """BLiMP's pairs as choices and held-out texts."""
    from holdfast.meters.probes import Item

    pairs = [
        json.loads(x) for x in (data / "benchmarks/blimp_67x60.jsonl").read_text().splitlines()
    ]
    items = [
        Item(id=str(i), probe="blimp", kind="choice", prompt="", answer=0, norm="none",
             choices=[pair["sentence_good"], pair["sentence_bad"]])
        for i, pair in enumerate(pairs[::2])
    ]  # fmt: skip
    rows = [
        {"text": json.loads(line)["text"][:1500], "domain": file.stem.removesuffix("_heldout")}
        for file in sorted((data / "text").glob("*_heldout.jsonl"))
        for line in file.read_text().splitlines()[:30]
    ]
    return items, rows


@app.command()
def read(folder: Path, model: str = "", seeds: int = 1, minutes: float = 7.0) -> None:
    """Keep each item's value under each condition. --model: realtext4m's folder, else the lab."""
    from holdfast.checkpoint import load_checkpoint
    from holdfast.data.rows import Source
    from holdfast.lab import base_path
    from holdfast.measure import text_documents
    from holdfast.meters.canary import Canary, read_canary
    from holdfast.meters.probes import read_probes

    started = time.perf_counter()
    data = Path(model).resolve().parents[1] / "data" if model else Path()
    items, rows = realtext_texts(data) if model else lab_texts(seeds)
    path = model or str(base_path())
    first = load_checkpoint("BASE", path, None, "float32")
    net, tokenizer = first.model, first.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        canary = Canary(sources=[Source(path=str(file))], max_documents=10**6)
        documents = text_documents(canary, tokenizer, min(first.context, 512))
    print(f"{len(items):,} items, {len(documents):,} windows", flush=True)

    def keep(name: str, of: Any) -> bool:
        """Read and store one condition; False once time is up."""
        target = folder / f"{name}.json"
        if target.exists():
            return True
        if time.perf_counter() - started > 60 * minutes:
            return False
        found = [*read_probes(of, tokenizer, items, 0), *read_canary(of, documents, "sealed", 0),
                 *read_canary(of, documents, "selection", 0)]  # fmt: skip
        values: Values = {}
        for r in found:
            values.setdefault(f"{r.unit}/{r.name}", {}).update(r.items)
        target.write_text(json.dumps(values))
        print(f"  {name} ({time.perf_counter() - started:.0f} s)", flush=True)
        return True

    def conditions() -> Iterator[tuple[str, Any]]:
        for tokens in (1024, 8192, 32768):
            batches(tokens)
            yield f"base-float32-{tokens}", net
        half = load_checkpoint("BASE", path, None, "bfloat16").model
        for tokens in (8192,):
            batches(tokens)
            yield f"base-bfloat16-{tokens}", half
        batches(8192)
        layers = net.config.num_hidden_layers
        for seed in range(1):
            for block in (0, layers - 1):
                for size in SIZES:
                    undo = planted(net, [block], size, seed)
                    yield f"noise-{size}-block{block}-{seed}", net
                    undo()

    done = all(keep(name, of) for name, of in conditions())
    print("all there" if done else "stopped: run it again", flush=True)


def draw(
    rng: np.random.Generator, pool: Values, items: int, documents: int
) -> dict[str, list[str]]:
    """Item ids of one run: a draw without replacement of each capability."""
    return {
        name: list(rng.choice(sorted(ids), min(len(ids), items if name[0] == "a" else documents),
                              replace=False))
        for name, ids in pool.items()
    }  # fmt: skip


def readings(values: Values, drawn: dict[str, list[str]]) -> list[Reading]:
    found = []
    for key, ids in drawn.items():
        unit, name = key.split("/", 1)
        some = {i: values[key][i] for i in ids}
        mean = sum(some.values()) / len(some)
        meter = "probe" if unit == "accuracy" else "canary"
        found.append(Reading(meter, name, "sealed", 0, mean, None, len(some), unit, items=some))
    return found


@app.command()
def judge(
    folder: Path, part: str = "", runs: int = 1000, items: int = 150, documents: int = 100
) -> None:
    """What the gate says of draws of the readings, and how soon damage is found (--part)."""
    kept = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    bases = {name: values for name, values in kept.items() if name.startswith("base")}
    pool: Values = kept["base-float32-8192"]
    sizes = ", ".join(f"{key.split('/', 1)[1]} {len(ids):,}" for key, ids in pool.items())
    print(f"{folder.name}: {len(kept)} conditions; items and documents: {sizes}")
    if part in ("", "base"):
        base_against_base(bases, pool, runs, items, documents)
    if part in ("", "damage"):
        rng = np.random.default_rng(1)
        found_of_damage(kept, pool, rng, items, documents)
        real_power(kept, pool, rng)


def base_against_base(
    bases: dict[str, Values], pool: Values, runs: int, items: int, documents: int
) -> None:
    """Readings of one model under two conditions, judged as if they were of two."""
    rng = np.random.default_rng(0)
    print(f"base against base, {runs:,} runs each of {items} items a probe, {documents} documents:")
    for said, some in (
        ("another batch size, float32", [n for n in bases if "float32" in n]),
        ("float32 before, bfloat16 after", None),
    ):
        failed, fallen, rows = 0, 0, 0
        changed_items: list[float] = []
        risen: list[float] = []
        for _ in range(runs):
            if some is not None:
                one, other = rng.choice(some, 2, replace=False)
            else:
                one = rng.choice([n for n in bases if "float32" in n])
                other = rng.choice([n for n in bases if "bfloat16" in n])
            drawn = draw(rng, pool, items, documents)
            before, after = readings(bases[one], drawn), readings(bases[other], drawn)
            result = decide(before, after, Gate(alpha=ALPHA))
            failed += str(result.verdict) == "FAIL"
            scores = [row for row in result.rows if row.unit == "accuracy"]
            rows += len(scores)
            fallen += sum(row.upper < 0 for row in scores)
            risen += [row.difference / row.before for row in result.rows if row not in scores]
            changed_items.append(np.mean([
                x.items[i] != y.items[i] for x, y in zip(before, after, strict=True)
                if x.unit == "accuracy" for i in x.items]))  # fmt: skip
        print(f"  {said}: {np.mean(changed_items):.2%} of the answers differ, losses by "
              f"{np.mean(risen):+.4%} (at most {max(map(abs, risen)):.4%})")  # fmt: skip
        print(f"    gate says FAIL: {against(failed, runs, ALPHA)}")
        print(f"    a fall of any size is shown, rows of scores: {against(fallen, rows, ALPHA)}")


def damaged(kept: dict[str, Values]) -> dict[str, Values]:
    return {name: values for name, values in kept.items() if name.startswith("noise")}


def found_of_damage(kept: dict[str, Values], pool: Values, rng: np.random.Generator, items: int,
                    documents: int, runs: int = 100) -> None:  # fmt: skip
    """The gate's verdict by size of the noise, over blocks, seeds and draws."""
    print(f"planted noise in one block, default margins, {runs} draws of each block and seed:")
    print("  size   accuracy       canary         FAIL  INCONCLUSIVE  PASS")
    for size in SIZES:
        words: list[str] = []
        falls, rises = [], []
        for name, values in damaged(kept).items():
            if name.split("-")[1] != str(size):
                continue
            for key, base in pool.items():
                means = [np.mean(list(one[key].values())) for one in (pool, values)]
                assert base.keys() == values[key].keys()
                if key.startswith("accuracy"):
                    falls.append(100 * (means[1] - means[0]))
                else:
                    rises.append(means[1] / means[0] - 1)
            for _ in range(runs):
                drawn = draw(rng, pool, items, documents)
                result = decide(readings(pool, drawn), readings(values, drawn), Gate(alpha=ALPHA))
                words.append(str(result.verdict))
        if words:
            shares = [words.count(w) / len(words) for w in ("FAIL", "INCONCLUSIVE", "PASS")]
            print(f"  {size:<6} {np.mean(falls):+6.2f} points  {np.mean(rises):+9.2%}   "
                  f"{shares[0]:7.0%} {shares[1]:10.0%} {shares[2]:8.0%}")  # fmt: skip


def real_power(kept: dict[str, Values], pool: Values, rng: np.random.Generator, draws: int = 300
               ) -> None:  # fmt: skip
    """Detection by true fall: each condition is one, of the items of all probes together."""
    order = [(key, i) for key, ids in pool.items() if key.startswith("accuracy") for i in ids]
    before = np.array([pool[key][i] for key, i in order])
    print(f"a fall is shown, {draws} draws a condition, of {len(order):,} items of all probes:")
    sizes = [n for n in (200, 500, 1500) if n <= len(order)]
    curves = []
    for name, values in damaged(kept).items():
        after = np.array([values[key][i] for key, i in order])
        line = [100 * (before.mean() - after.mean()), 100 * np.mean(before != after)]
        for n in sizes:
            for paired in (True, False):
                hits = 0
                for _ in range(draws):
                    one = rng.choice(len(order), n, replace=False)
                    two = one if paired else rng.choice(len(order), n, replace=False)
                    hits += shown(before[one], after[two], paired)
                line.append(hits / draws)
        curves.append((line, name))
    print("  fall   changed " + "".join(f"{n:>5} paired {'unpaired':>9}" for n in sizes))
    for line, name in sorted(curves):
        cells = "".join(f"{share:>11.0%}" for share in line[2:])
        print(f"  {line[0]:5.2f}pt {line[1]:5.1f}% {cells}   {name}")


if __name__ == "__main__":
    app()
