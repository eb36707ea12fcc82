"""The mixer file: which share of a model's replay each domain has, frozen for the model's life.

    format: 1
    tokenizer: 0b5f...      of the one that counted; absent where nothing was counted
    domains:
      code: {share: 0.3, tokens: 51200}
      prose: {share: 0.7, tokens: 119467}
    sources:
    - {path: code.jsonl, domain: code, sha256: 9c1e...}
    - {path: prose.jsonl, domain: prose, sha256: 77aa...}

It lies in the run folder and beside the artifact, so that a stage that starts there replays the
same mix. A source is known by its content: its `path` may be changed, its rows may not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from holdfast.data.example import EncodeReport
from holdfast.data.fingerprint import of_source, of_tokenizer
from holdfast.data.rows import Source, iter_rows
from holdfast.errors import RequestError, did_you_mean
from holdfast.explain import explain
from holdfast.files import write_text
from holdfast.lineage import Stage
from holdfast.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "mixer.yaml"
"""Its name in a run folder, and beside an artifact."""
UNCUT = 2**31
"""Tokens are counted before rows are cut to any length."""
ROUNDING = 1e-6
"""By how much written shares may miss a sum of one."""


class Domain(Section):
    """One kind of data."""

    share: float = Field(gt=0.0, le=1.0)
    """Part of the replayed tokens."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens counted when the file was frozen; null: not counted."""


class FrozenSource(Source):
    """Rows as they were when the file was frozen."""

    sha256: str
    """Of the content and what is read of it; not of the path."""

    @property
    def now(self) -> Source:
        """The same source as it may be read today."""
        return Source(**self.model_dump(exclude={"sha256"}))


class Mixer(Section):
    """What is replayed, and in which proportions."""

    format: Literal[1] = 1
    """Version of this file."""
    tokenizer: str | None = None
    """SHA-256 of the vocabulary that counted; null: nothing was counted."""
    domains: dict[str, Domain] = Field(min_length=1)
    """By name; the shares sum to one."""
    sources: list[FrozenSource] = Field(min_length=1)
    """Where the rows are."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = sum(domain.share for domain in self.domains.values())
        if abs(total - 1) > ROUNDING:
            raise ValueError(f"domains: the shares sum to {total:g}; make them sum to 1")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Share of each domain."""
        return {name: domain.share for name, domain in self.domains.items()}

    def changed(self) -> Iterator[str]:
        """What is no longer as it was frozen: a line for each source, by its path."""
        for source in self.sources:
            try:
                if digest(source.now) != source.sha256:
                    yield f"'{source.path}' is not what was frozen: its content has changed"
            except RequestError as error:
                yield from error.problems

    def check(self, path: Path | str) -> None:
        """Raise a RequestError that names every source which is not what was frozen."""
        found = [
            f"{path}: {problem}; restore it (a moved file: change its path in {path}), or freeze a "
            "new mixer"
            for problem in self.changed()
        ]
        if found:
            raise RequestError(*found)

    def write(self, path: Path) -> Path:
        """Write the file, which must not exist yet."""
        if path.exists():
            raise RequestError(
                f"--out: '{path}' exists already, and a mixer is kept for life; give another name"
            )
        if not path.parent.is_dir():
            raise RequestError(f"--out: folder '{path.parent}' does not exist; make it first")
        plain = self.model_dump(mode="json", exclude_defaults=True)
        text = yaml.safe_dump({"format": 1, **plain}, sort_keys=False, allow_unicode=True)
        return write_text(path, text)


def read_mixer(path: Path | str, field: str = "levers.replay.mixer") -> Mixer:
    """A mixer file; whether its sources are still the same is for `Mixer.check` to say.

    Raises:
        RequestError: every problem in it, one line each; `field` is where its path was given.
    """
    path = Path(path).expanduser()
    made = "`holdfast mixer freeze` writes one"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"{field}: '{path}' cannot be read ({error.strerror}); {made}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{field}: '{path}' is not YAML text; {made}") from error
    if not isinstance(found, dict) or "format" not in found:
        raise RequestError(f"{field}: '{path}' is not a mixer file (no 'format' in it); {made}")
    if found["format"] != 1:
        raise RequestError(
            f"{path}: format {found['format']} is not known; this version reads format 1"
        )
    try:
        return Mixer.model_validate(found)
    except ValidationError as error:
        raise RequestError(*explain(error, Mixer, where=str(path))) from error


def freeze(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase | None = None,
    shares: Mapping[str, float] | None = None,
) -> Mixer:
    """The mix of the sources as they are now.

    Args:
        sources: a row's own domain comes before its source's, that before the file's name.
        tokenizer: counts the tokens of each domain.
        shares: of the domains named, part of all tokens; the others share the rest by their tokens.

    Raises:
        RequestError: a row or a share cannot be used, or tokens are to be counted without a
            tokenizer.
    """
    sources = [s.model_copy(update={"domain": s.domain or Path(s.path).stem}) for s in sources]
    counts = _counted(sources, tokenizer)
    found = _shares(counts, dict(shares or {}), counted=tokenizer is not None)
    return Mixer(
        tokenizer=None if tokenizer is None else tokenizer_digest(tokenizer),
        domains={
            name: Domain(share=share, tokens=None if tokenizer is None else counts[name])
            for name, share in sorted(found.items())
        },
        sources=[FrozenSource(**source.model_dump(), sha256=digest(source)) for source in sources],
    )


def digest(source: Source) -> str:
    """SHA-256 of a source's content and of what is read of it, wherever it lies."""
    return _sha256(of_source(source))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how many tokens a text has: vocabulary and merges."""
    return _sha256(of_tokenizer(tokenizer)["vocabulary"])


def mixer_of(stage: Stage) -> Path | None:
    """The mixer file that came with a stage: in its run folder, else beside its weights."""
    folders = [stage.run, *reversed(stage.adapters), Path(stage.model)]
    files = [folder / FILE for folder in folders if folder is not None]
    return next((file for file in files if file.is_file()), None)


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _counted(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, int]:
    """Tokens of each domain that has any; rows where there is no tokenizer."""
    from holdfast.data.chat import encode

    counts = Counter[str]()
    for source in sources:
        for row in iter_rows(source):
            assert row.domain is not None
            report = EncodeReport(tokens=1)
            if tokenizer is not None:
                report = EncodeReport()
                encode(row, tokenizer, max_length=UNCUT, report=report)
            counts[row.domain] += report.tokens
    if not +counts:
        raise RequestError(f"{sources[0].path}: has no rows to replay; give rows with text")
    return dict(+counts)


def _shares(counts: dict[str, int], given: dict[str, float], *, counted: bool) -> dict[str, float]:
    """The share of every domain in `counts`."""
    for name, share in given.items():
        if name not in counts:
            hint = did_you_mean(name, counts)
            raise RequestError(f"--share: no row is of domain '{name}'; {hint}")
        if not 0 < share <= 1:
            raise RequestError(f"--share: {name}={share:g} is not above 0 and at most 1; give 0.3")
    rest = [name for name in counts if name not in given]
    left = 1 - sum(given.values())
    if not rest and abs(left) > ROUNDING:
        raise RequestError(
            f"--share: the shares of all domains sum to {1 - left:g}; make them sum to 1, such as "
            f"{next(iter(given))}={given[next(iter(given))] / (1 - left):.3g}"
        )
    if rest and left <= ROUNDING:
        raise RequestError(
            f"--share: the shares sum to {1 - left:g}, which leaves nothing for "
            f"{', '.join(rest)}; give less, or a share of each"
        )
    if len(rest) > 1 and not counted:
        raise RequestError(
            f"--model: missing, to count the tokens of {', '.join(rest)}; give it, or --share "
            f"{rest[0]}=0.3 and so on for each"
        )
    total = sum(counts[name] for name in rest)
    scale = 1 if rest else 1 / (1 - left)  # to the last digit
    shares = {name: share * scale for name, share in given.items()}
    return shares | {name: left * counts[name] / total for name in rest}
