"""The arms: how each one trains, and what its learning rates are multiples of.

An arm is `key=value` settings of a recipe, or a peer that runs through its own package. `LESSON`
tokens of the lesson are read in every step of every arm; what an arm reads besides (replay, anchor
rows) comes on top and is counted in its seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from holdfast.levers.replay import EARLIER

RATES = (0.5, 1.0, 2.0, 4.0, 6.0)
"""Trials of every arm: times the automatic rate of full fine-tuning, or a quarter of an adapter's
(`levers.budget`): on the lab adapters break at three times theirs."""
HOTTER = (10.0, 16.0)
"""More of them, one after the other, while the hottest so far learned most and not enough."""
VALIDATION = 100
"""The seed on which rates are chosen."""
LESSON = 512
"""Tokens of the lesson in a step."""

CLASSIC = ["levers.budget.spike=0", "levers.budget.schedule=cosine", "train.order=random"]
"""The classic recipe's schedule and order, and no spike rule, for what is not holdfast's."""
PLAIN = ["levers.kl_anchor=none", "levers.adapter=none", *CLASSIC]
ADAPTER = ["levers.kl_anchor=none", *CLASSIC]
HERDED = ["levers.budget.schedule=linear", "train.order=herded"]
"""The default's schedule and order."""

UNHERDED = ["train.order=random", "levers.kl_anchor.weight=2"]
"""The default before its rows were herded and its anchor weighed by the base's loss alone."""


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    words: list[str] = field(default_factory=list)
    """Settings of a recipe; `{replay}` is the file of old text, `{all}` that of all domains."""
    extra: float = 0.0
    """Share of a step's tokens that is not the lesson's."""
    peer: Literal["trl-lora", "trl-sdft"] | None = None
    """What trains in the place of holdfast."""
    soup: float | None = None
    """Weight of the tuned model in an average with the base, taken after training."""
    times: float = 1.0
    """What the rates are multiplied by, besides."""
    cool: bool = False
    """Whether low rates are what it is about, so that it gets no hotter ones."""
    watched: bool = False
    """Whether training itself reads a canary, as often as it will."""
    staged: bool = False
    """Whether a second stage starts from the first one's run folder, which says what it taught, and
    not from its weights alone."""
    earlier: float = 0.0
    """Share of a second stage's tokens that is the first lesson's rows. An arm that is not `staged`
    is given them as a source, for next-token loss."""
    sequence: bool = False
    """Whether it is for a sequence alone."""
    note: str = ""

    @property
    def adapted(self) -> bool:
        """Whether the automatic rate is an adapter's."""
        return self.peer == "trl-lora" or any("adapter.method" in word for word in self.words)

    def batch_tokens(self, stage: int = 0) -> int:
        """Tokens of a step, so that `LESSON` of them are the lesson's."""
        return round(LESSON / (1 - self.extra - (self.earlier if stage else 0.0)))


def adapter(method: str, *more: str) -> Arm:
    """An adapter without an anchor."""
    return Arm([*ADAPTER, f"levers.adapter.method={method}", *more], times=0.25)


def replay(share: float, domains: str = "{replay}", *more: str, **about: Any) -> Arm:
    """Next-token replay of text that is like the base's own pretraining data."""
    words = [
        f"levers.replay.sources=[{domains}]",
        f"levers.replay.fraction={share}",
        "levers.replay.own_pretraining=true",
    ]
    return Arm([*PLAIN, *words, *more], extra=share, **about)


def ours(*words: str, **about: Any) -> Arm:
    """The default, with something else."""
    return Arm([*words], extra=0.5, staged=True, **{"earlier": EARLIER} | about)


ARMS: dict[str, Arm] = {
    "full": Arm(PLAIN),
    "full, low rate": Arm(PLAIN, times=0.1, cool=True),
    "full, linear": Arm([*PLAIN, HERDED[0]]),
    "full, herded": Arm(
        [*PLAIN, *HERDED],
        note="holdfast's order and schedule without its anchor",
    ),
    "trl LoRA": Arm(
        peer="trl-lora", times=0.25, note="SFTTrainer, LoRA on all linear, r 16, alpha 32"
    ),
    "LoRA, MLP": adapter("lora"),
    "rsLoRA": adapter("rslora", "levers.adapter.target=all-linear", "levers.adapter.r=64"),
    "DoRA": adapter("dora", "levers.adapter.target=all-linear"),
    "OFT": adapter("oft", "levers.adapter.target=all-linear"),
    "OSF": adapter("osf", "levers.adapter.target=all-linear"),
    "CorDA": adapter("corda", "levers.adapter.target=all-linear"),
    "L2-SP": Arm([*PLAIN, "levers.l2_sp.weight=0.1"]),
    "EWC": Arm([*PLAIN, "levers.ewc.weight=20"]),
    "freeze": Arm([*PLAIN, "levers.freeze.presets=[embeddings]", "levers.freeze.first_blocks=2"]),
    "replay 1 %": replay(0.01),
    "replay 5 %": replay(0.05),
    "replay 25 %": replay(0.25),
    "replay 25 %, lesson 15 %": replay(
        0.25, earlier=EARLIER, sequence=True, note="replays the first lesson in the second stage"
    ),
    "KL on task": Arm(
        [
            "levers.adapter=none",
            *CLASSIC,
            "levers.kl_anchor.on=task",
            "levers.kl_anchor.weight=1",
        ],
    ),
    "DFT": Arm([*PLAIN, "levers.token_gate.method=dft"]),
    "EAFT": Arm([*PLAIN, "levers.token_gate.method=eaft"]),
    "STM": Arm([*PLAIN, "levers.token_gate.method=stm"]),
    "FLOW": Arm([*PLAIN, "levers.token_gate.method=flow"]),
    "context frozen": Arm([*PLAIN, "levers.context_frozen.enabled=true"]),
    "displacement cap": Arm([*PLAIN, "levers.budget.cap=0.05"]),
    "decay to base": Arm([*PLAIN, "levers.optimizer.decay_to_base=30"]),
    "replay 50 %, KL": Arm(
        [
            "levers.adapter=none",
            *CLASSIC,
            "levers.replay.sources=[{replay}]",
            "levers.replay.fraction=0.5",
            "levers.kl_anchor.self_generated.fraction=0",
            "levers.kl_anchor.weight=2",
        ],
        extra=0.5,
    ),
    "trl SDFT": Arm(peer="trl-sdft", note="needs a base that follows a demonstration in context"),
    "weight average": Arm(PLAIN, soup=0.5),
    "classic stack": Arm(
        [
            "levers.adapter.method=lora",
            "levers.adapter.target=all-linear",
            "levers.budget.schedule=cosine",
            "train.order=random",
            "levers.replay.sources=[{replay}]",
            "levers.replay.fraction=0.15",
            "levers.replay.own_pretraining=true",
            "levers.kl_anchor.on=task",
            "levers.kl_anchor.weight=0.05",
        ],
        extra=0.15,
        times=0.25,
        note="replay 15 %, KL 0.05 on the lesson, LoRA r 16, alpha 32, cosine, clipping",
    ),
    "holdfast default": ours(),
    "holdfast, random order": ours(*UNHERDED),
    "holdfast, cosine": ours(*UNHERDED, "levers.budget.schedule=cosine"),
    "holdfast, budget 3 %": ours(
        "budget.forgetting=3%",
        watched=True,
        note="watches as many texts as in benchmarks/budget.py, none of which it is judged by",
    ),
    "joint": replay(
        0.5,
        "{all}",
        earlier=EARLIER,
        note="all old domains and lessons replayed as one is learned: an upper bound",
    ),
    "joint, herded": replay(
        0.5,
        "{all}",
        *HERDED,
        earlier=EARLIER,
        note="the same in the default's order and schedule",
    ),
}

SCAN: dict[str, Arm] = {
    f"weight {weight:g}, {share:.0%} of the tokens": Arm(
        [
            "levers.adapter=none",
            f"levers.kl_anchor.weight={weight}",
            f"levers.kl_anchor.self_generated.fraction={share}",
        ],
        extra=share,
    )
    for weight, share in (
        (0.3, 0.5), (1, 0.5), (2, 0.5), (5, 0.5), (1, 0.333), (2, 0.333), (5, 0.333), (2, 0.667)
    )
}  # fmt: skip
"""What `scan` asks of the anchor: how heavy, and on how many tokens."""
SCAN_RATES = (4.0, 2.0)

STAGES: dict[str, Arm] = {
    f"{share:.0%} for earlier lessons": ours(
        f"levers.replay.earlier.fraction={share}", earlier=share
    )
    for share in (0.0, 0.05, 0.3)
}
"""What `stages` asks, beside the default: how much of a second stage the first one needs."""
