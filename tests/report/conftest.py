"""A made-up run with every kind of reading, its verdict computed by the gate itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from holdfast.gate.verdict import Gate, decide
from holdfast.meters import Reading
from holdfast.report.data import ReportData
from holdfast.report.frontier import of_checkpoints


def sealed(name, values, *, meter="probe", unit="accuracy", tags=()):
    items = {f"{name}-{i}": float(value) for i, value in enumerate(values)}
    return Reading(
        meter, name, "sealed", 0, 0.0, 0.0, len(items), unit, tags=tags, items=items
    )  # fmt: skip


def after_fall(before, fell, rose, rng):
    after = before.copy()
    after[rng.permutation(np.flatnonzero(before == 1))[:fell]] = 0
    after[rng.permutation(np.flatnonzero(before == 0))[:rose]] = 1
    return after


def made_up_verdict(rng, *, bad=True):
    before, after = [], []
    for name, rate, n, fell, rose, tags in (
        ("invoice_dates", 0.41, 400, 4, 171, ("target",)),
        ("mmlu", 0.62, 2000, 45, 40, ()),
        ("gsm8k", 0.55, 1319, 130 if bad else 30, 28, ()),
        ("humaneval", 0.35, 164, 5, 4, ()),
        ("multilingual/de", 0.70, 900, 14, 12, ()),
        ("rare_scripts", 0.24, 1200, 22, 20, ("rare",)),
        ("over_application", 0.97, 300, 24, 1, ("adoption",)),
    ):
        x = (rng.random(n) < rate).astype(float)
        before.append(sealed(name, x, tags=tags))
        after.append(sealed(name, after_fall(x, fell, rose, rng), tags=tags))
    for name, level, rise in (("web", 2.8, 0.002), ("code", 1.1, -0.001), ("papers", 2.4, 0.004)):
        x = rng.gamma(20, level / 20, 300)
        y = x * (1 + rise) + rng.normal(0, 0.02, 300)
        before.append(sealed(name, x, meter="canary", unit="nats"))
        after.append(sealed(name, y, meter="canary", unit="nats"))
    return decide(before, after, Gate())


def made_up_readings(rng, steps=400, every=50):
    records = []

    def add(meter, name, step, value, stderr=None, split="train", unit="nats"):
        record = {"step": step, "meter": meter, "name": name, "split": split, "value": value}
        records.append(record | {"stderr": stderr, "n": 100, "unit": unit})

    for step in range(0, steps, 2):
        task = 0.6 + 1.6 * math.exp(-step / 70) + rng.normal(0, 0.05)
        anchor = 0.012 * (1 - math.exp(-step / 60)) + abs(rng.normal(0, 0.001))
        add("loss", "task", step, task)
        add("loss", "kl_anchor", step, anchor)
        add("loss", "l2_sp", step, anchor / 6)
        add("loss", "total", step, task + anchor)
        add("grad_norm", "grad_norm", step, 0.8 + rng.gamma(2, 0.15), unit="norm")
        add("learning_rate", "lr", step, 1e-4 * (1 + math.cos(math.pi * step / steps)) / 2, unit="")
    for step in range(0, steps + 1, every):
        for name, level, rise in (("web", 2.8, 0.6), ("code", 1.1, -0.2), ("papers", 2.4, 0.8)):
            value = level * (1 + rise / 100 * step / steps + rng.normal(0, 4e-4))
            add("canary", name, step, value, 0.0012 * level, "selection")
        if step:
            rise = 1.4 * step / steps
            add("fall", "canary/web", step, 0.02 * rise, 0.003, "selection")
            add("evidence", "canary/web", step, rise, None, "selection", "alarms")
        for name, level in (("mmlu", 0.62), ("gsm8k", 0.55), ("invoice_dates", 0.41)):
            gain = 0.4 * (1 - math.exp(-step / 90)) if name == "invoice_dates" else -0.02
            value = level + gain * min(1, step / 100)
            add("probe", name, step, value, 0.014, "selection", "accuracy")
    for layer in range(14):
        add("drift", f"layers.{layer}", steps, 0.004 + 0.0012 * layer % 0.009, unit="relative")
    add("drift", "total", steps, 0.0087, unit="relative")
    for step, gain, fall in ((100, 0.3, 0.2), (200, 0.5, 0.8), (300, 0.6, 1.4)):
        add("gain", "target", step, gain, None, "selection", "share")
        add("worst_fall", "canary/<i>web</i>", step, fall, None, "selection", "margins")
    add("alarm", "canary/web", 300, 1.0, None, "selection", "")
    add("alarm", "wiring/<b>base</b>", 50, 1.0, None, "selection", "")
    return records


def made_up_run(*, bad=True, title="invoice-assistant-3b"):
    rng = np.random.default_rng(7)
    verdict, readings = made_up_verdict(rng, bad=bad), made_up_readings(rng)
    return ReportData(
        title=title,
        verdict=verdict,
        readings=readings,
        frontier=of_checkpoints(readings, kept=200),
        recipe={
            "model": {"name": "org/base-3b", "revision": "8f1c2ab"},
            "levers": {
                "replay": {"share": 0.15, "domains": {"web": 0.6, "code": 0.4}},
                "kl_anchor": {"beta": 0.05, "on": "anchor"},
                "adapter": {"kind": "lora", "rank": 16, "alpha": 32},
            },
            "gate": {"alpha": 0.05, "margins": {"gsm8k": "3pt", "canary": "1%"}},
        },
        streams={
            "task": {"tokens": 4_200_000, "rows": 12_000, "share": 0.7},
            "replay/web": {"tokens": 1_100_000, "rows": 900, "share": 0.18},
            "anchor": {"tokens": 700_000, "rows": 3_000, "share": 0.12},
        },
        environment={
            "versions": {"torch": "2.9.0", "transformers": "5.1.0"},
            "device": "one accelerator, 80 GB",
            "hashes": {"model": "sha256:" + "4f" * 32, "data": "sha256:" + "a0" * 32},
        },
        summary={
            "seconds": 5321.4,
            "steps": 400,
            "tokens": 6_000_000,
            "rewound_to": 0.85,
            "alarms": [
                {"step": 300, "name": "canary/web", "text": "canary/web has risen by too much"}
            ],
            "refused_steps": [{"step": 84, "reason": "gradient not finite"}, 212],
        },
    )


@pytest.fixture(scope="session")
def run():
    return made_up_run()
