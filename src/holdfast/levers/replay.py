"""Replay: rows of the base's kind beside the lesson, as an exact share of the tokens.

Source: Robins 1995; 1 % suffices where it is the base's own data (arXiv 2502.06042).
Equation: ntp adds weight * mean NLL of replay tokens; with the default weight r / (1 - r) the loss
is the textbook (1 - r) L_lesson + r L_replay, up to a constant factor.
Acts on: the mixture; the loss on rows with next-token loss.
Default loss: kl. Hard labels of a corpus that is not the base's own can be worse than no replay
(Llama-3.2-1B: 46.0 against 49.1 without, 52.7 for KL on the same text, arXiv 2605.26097); of the
base's own pretraining data they are samples of what it was fitted to, so there ntp is the default.
Counterexamples are rows of the lesson's kind that it must leave alone. Their right answer is given,
so they have next-token loss; in the role of replay, not of the lesson: they have a share and a
weight of their own, and the lesson's loss and readings stay those of the lesson.
Earlier lessons: a base that was itself fine-tuned hardly writes what it was taught unasked, so rows
that it writes do not hold that; the rows that it learned do.
Cost: its fractions of the tokens of each step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from holdfast.data.example import Role
from holdfast.data.mixer import Mixer, mixer_of, read_mixer, tokenizer_digest
from holdfast.data.rows import Source
from holdfast.levers import Lever, Memory, Setup, StepState, Term, TokenLosses, shared_sum
from holdfast.lineage import Stage, gone
from holdfast.section import Section

if TYPE_CHECKING:
    from holdfast.data.mixture import Stream

EARLIER = 0.15
"""Share of the tokens for earlier lessons: of the lab's verbs 5 % kept 90 %, 15 % 99 %, 30 % all,
and without it 5 % was left (docs/defaults.md)."""


class Apart(Section):
    """Rows with a share of their own, outside the corpus's proportions."""

    sources: list[Source] = Field(default_factory=list)
    """As in `levers.replay.sources`; empty: none."""
    fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of each step's tokens. 0 turns it off."""

    @property
    def share(self) -> float:
        """Fraction of each step's tokens that is taken."""
        return self.fraction if self.sources else 0.0


class Earlier(Apart):
    """What the stages before this one taught."""

    fraction: float = Field(default=EARLIER, ge=0.0, lt=1.0)
    """Share of each step's tokens. 0 turns it off."""


class Replay(Lever):
    """Old data to keep reading. Without sources or a mixer the lever is off."""

    OFF: ClassVar = {"fraction": 0.0}

    sources: list[Source] = Field(default_factory=list)
    """Files, folders or hub ids, with `domain` and `proportion` where there are several."""
    mixer: str | None = None
    """A file written by `holdfast mixer freeze`, in place of `sources`. A stage that starts from
    one with a mixer finds it there by itself, unless sources are given or `replay` is none."""
    fraction: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of each step's tokens, exact to within one row over the whole run. 0 turns it off."""
    loss: Literal["auto", "kl", "ntp"] = "auto"
    """kl: the rows are anchor rows for `kl_anchor`. ntp: next-token loss, for the base's own
    pretraining data. auto: ntp where `own_pretraining` says so, else kl."""
    own_pretraining: bool = False
    """Whether the corpus is what the base was pretrained on."""
    weight: float | None = Field(default=None, ge=0.0)
    """Weight of the mean next-token loss (of ntp rows and counterexamples together) beside the
    lesson's; empty: r / (1 - r), r their share of the tokens."""
    keep: Apart = Apart()
    """Curated rows of skills to keep, whatever their part in the corpus; the loss is kl where it is
    not given, whatever the corpus is."""
    counterexamples: Apart = Apart()
    """Rows like the lesson's to which it does not apply, with the answer that stays right; their
    loss is always ntp."""
    earlier: Earlier = Earlier()
    """The rows that earlier stages learned; the loss is kl where it is not given. A stage that
    starts from the folder of a run finds them there by itself, unless sources are given, `replay`
    is none or nothing holds the base to its outputs."""

    @model_validator(mode="after")
    def _one_corpus(self) -> Self:
        if self.mixer is not None and self.sources:
            raise ValueError("sources and mixer are both given; give one of them")
        return self

    @property
    def off(self) -> bool:
        """True when nothing is replayed."""
        return self.share == 0

    @property
    def share(self) -> float:
        """Fraction of each step's tokens that is taken from the lesson."""
        return sum(share for _, share, _ in self._kinds())

    @property
    def anchored(self) -> bool:
        """Whether some rows are for `kl_anchor`."""
        return any(share and role is Role.ANCHOR for _, share, role in self._kinds())

    @property
    def _corpus(self) -> float:
        return self.fraction if self.sources or self.mixer else 0.0

    def _kinds(self) -> tuple[tuple[str, float, Role], ...]:
        """Name, share and role of the corpus and of what stands apart from it."""
        kept = "kl" if self.loss == "auto" else self.loss
        corpus = "ntp" if self.loss == "auto" and self.own_pretraining else kept
        roles = {"kl": Role.ANCHOR, "ntp": Role.REPLAY}
        return (
            ("replay", self._corpus, roles[corpus]),
            ("keep", self.keep.share, roles[kept]),
            ("counterexamples", self.counterexamples.share, Role.REPLAY),
            ("earlier", self.earlier.share, roles[kept]),
        )

    def sources_read(self) -> list[Source]:
        """Every source that is replayed; those of a mixer are read from its file.

        Raises:
            RequestError: the mixer file cannot be read.
        """
        return [source for kind, share, _ in self._kinds() if share for source in self._of(kind)]

    def _of(self, kind: str) -> Sequence[Source]:
        if kind == "keep":
            return self.keep.sources
        if kind == "counterexamples":
            return self.counterexamples.sources
        if kind == "earlier":
            return self.earlier.sources
        mixer = self._mixer()
        return self.sources if mixer is None else [source.now for source in mixer.sources]

    def _mixer(self) -> Mixer | None:
        return None if self.mixer is None else read_mixer(self.mixer)

    def check_mixer(self) -> None:
        """Raise a RequestError that names each source of the mixer which is not as it was."""
        if (mixer := self._mixer()) is not None and self._corpus:
            mixer.check(str(self.mixer))

    def identity(self) -> dict[str, str]:
        """What of the mixer a run may only be continued with."""
        if self.mixer is None:
            return {}
        return {
            "mixer_sha256": hashlib.sha256(Path(self.mixer).expanduser().read_bytes()).hexdigest()
        }

    def inherited(self, stage: Stage, lesson: Sequence[Source], *, anchored: bool) -> Self:
        """The same with what came with a stage, where it is left open: its mixer, its lessons.

        Args:
            lesson: what is to be taught now; learning it further is not to be held back.
            anchored: whether there is an anchor to hold lessons by.
        """
        came: dict[str, Any] = {}
        if not self.fraction:
            return self
        if not (self.sources or self.mixer) and (file := mixer_of(stage)) is not None:
            came["mixer"] = str(file)
        if anchored and self.earlier.fraction and not self.earlier.sources:
            there, _ = _lessons(stage)
            again = {source.path for source in lesson}
            if rest := [source for source in there if source.path not in again]:
                came["earlier"] = self.earlier.model_copy(update={"sources": rest})
        return self.model_copy(update=came) if came else self

    def warnings(
        self,
        stage: Stage,
        canary: Iterable[str],
        streams: Iterable[str],
    ) -> list[str]:
        """What a user should know of before training.

        Args:
            stage: where training starts.
            canary: domains of the canary.
            streams: names of this lever's streams.
        """
        found = []
        _, lost = _lessons(stage)
        if lost and self.fraction and self.earlier.fraction and not self.earlier.sources:
            found.append(
                f"the model was taught {', '.join(lost)}, which is not there any more: nothing "
                "holds that lesson; give its rows in levers.replay.earlier.sources"
            )
        if self.off:
            return found
        came = mixer_of(stage)
        if came is not None and self.sources:
            found.append(
                f"the model came with a mixer, '{came}', but levers.replay.sources is given: this "
                "stage replays another mix"
            )
        replayed = {name.partition("/")[2] for name in streams if not name.startswith("earlier/")}
        without = sorted({*canary} - replayed)
        if replayed and without:
            found.append(
                f"in the canary but not replayed: {', '.join(without)}; add rows of these domains "
                "to levers.replay, or watch their readings"
            )
        return found

    def streams(self, setup: Setup) -> Sequence[Stream]:
        """One stream a domain, each with its own exact share of the tokens."""
        if self.off:
            return ()
        from holdfast.data.replay_rows import domain_streams

        self.check_mixer()
        mixer = self._mixer()
        streams: list[Stream] = []
        report: dict[str, Any] = {}
        for kind, share, role in self._kinds():
            if not share:
                continue
            found, counts = domain_streams(
                self._of(kind),
                setup.tokenizer,
                setup.max_length,
                share,
                role,
                setup.folder,
                kind=kind,
                shares=mixer.shares if mixer is not None and kind == "replay" else None,
            )
            streams += found
            report |= counts
        if mixer is not None and self._corpus:
            counted = mixer.tokenizer in (None, tokenizer_digest(setup.tokenizer))
            other = "" if counted else "; its shares were counted with another tokenizer"
            setup.notes["mixer"] = f"{self.mixer}{other}"
        setup.notes["replay"] = report
        return streams

    def terms(self, out: TokenLosses, state: StepState, memory: Memory) -> dict[str, Term]:
        """Weight * sum NLL / (replay positions of the whole step)."""
        share = sum(share for _, share, role in self._kinds() if role is Role.REPLAY)
        if not share or not state.totals[Role.REPLAY]:
            return {}
        weight = share / (1 - share) if self.weight is None else self.weight
        sum_nll = shared_sum(out.nll, out.nll_roles == Role.REPLAY)
        return {"replay": Term(sum_nll, state.totals[Role.REPLAY], weight)}


def _lessons(stage: Stage) -> tuple[list[Source], list[str]]:
    """What the stages up to this one learned: the sources, and the paths of files that are gone."""
    taught = {one["path"]: Source(**one) for one in stage.taught()}
    there = [source for path, source in taught.items() if not gone(path)]
    return there, [path for path in taught if gone(path)]
