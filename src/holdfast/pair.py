"""Two checkpoints side by side, as `compare`, `rewind` and the gate read them.

`Texts` is what they are read with, `load_pair` has both in memory, `readers` reads the same texts
with either; where their tokenizers differ, the canary can only be compared in bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from holdfast import model as models
from holdfast.artifact import RunFolder
from holdfast.checkpoint import Checkpoint, Dtype, load_checkpoint, require_made_for
from holdfast.data.rows import Source, check_rows
from holdfast.errors import RequestError
from holdfast.files import full_disk_named, require_writable
from holdfast.gate.verdict import Gate, GateResult, Verdict, decide
from holdfast.lineage import locate
from holdfast.measure import (
    Measure,
    sampled_documents,
    shared_documents,
    taught_documents,
    text_documents,
)
from holdfast.meters import Reading
from holdfast.meters.canary import Canary, Document
from holdfast.meters.probes import Item, allow_code, load_items
from holdfast.meters.probes.items import GENERATED
from holdfast.recipe import Recipe, load_recipe

QUIET = Console(quiet=True)
TUNED_STEP = 1
"""Readings of a tuned model whose steps nobody counted here; the base's are at 0."""
DIFFERENT = (
    "the tokenizers of the two differ: losses are compared in bits per byte, and no such "
    "comparison is a PASS"
)


@dataclass(frozen=True)
class Texts:
    """What a checkpoint is read with."""

    canary: Canary = field(default_factory=Canary)
    """Without sources: of two checkpoints, samples of the base."""
    probes: Sequence[str] = ()
    """JSONL files of items."""
    run_generated_code: bool = False
    """Run what the models write for code items, in a sandbox; without it they are refused."""
    lesson: Sequence[Source] = ()
    """Rows of what was taught, best of all those that were not trained on: for its loss, KL on new
    rows, over-application of its form, label collapse, its experts."""

    def items(self) -> list[Item]:
        """The items, after every file was looked at. Raises RequestError with all problems."""
        problems: list[str] = []
        for source in self.canary.sources:
            try:
                check_rows(source, need_response=False)
            except RequestError as error:
                problems += error.problems
        for source in self.lesson:
            try:
                check_rows(source, need_response=True)
            except RequestError as error:
                problems += error.problems
        try:
            found = load_items(self.probes)
            allow_code(found, self.run_generated_code)
        except RequestError as error:
            problems += error.problems
        if problems:
            raise RequestError(*problems)
        return found

    def measure(
        self,
        tokenizer: Any,
        canary: list[Document],
        items: list[Item],
        longest: int,
        *,
        alike: bool = True,
    ) -> Measure:
        """What reads a model with them.

        Args:
            longest: tokens of the longest window.
            alike: whether losses on the lesson can be compared; else only its form is looked at.
        """
        lesson = taught_documents(self.lesson, tokenizer, longest)
        code = self.run_generated_code
        heldout = lesson if alike else []
        return Measure(tokenizer, canary, items, heldout, run_generated_code=code, rows=lesson)


def recipe_of_run(tuned: str) -> Recipe | None:
    """The recipe of a finished run; None where `tuned` is no run folder."""
    run = Path(tuned).expanduser()
    if not (run / "recipe.yaml").is_file() or locate(tuned, field="TUNED").run is None:
        return None
    return load_recipe(run / "recipe.yaml")


def of_run(tuned: str) -> tuple[Texts, Gate] | None:
    """What a run was read with and held to; None where `tuned` is no run folder."""
    recipe = recipe_of_run(tuned)
    if recipe is None:
        return None
    code = recipe.train.run_generated_code
    return Texts(recipe.canary, recipe.probes, code), recipe.gate


@dataclass(frozen=True)
class Pair:
    """A base and what was made of it, in memory; not the same weights."""

    base: Checkpoint
    tuned: Checkpoint
    base_sha: str
    """`hash_weights` of each."""
    tuned_sha: str

    @property
    def longest(self) -> int:
        """Tokens of the longest window that both take."""
        return min(self.base.context, self.tuned.context)

    def environment(self) -> dict[str, Any]:
        """What a report says of them."""
        return {
            "base.weights_sha256": self.base_sha,
            "tuned.weights_sha256": self.tuned_sha,
            "versions": versions(),
        }

    def same_vocabulary(self) -> bool:
        """Whether the tokens are the same by name and number."""
        same: bool = self.base.tokenizer.get_vocab() == self.tuned.tokenizer.get_vocab()
        return same

    def texts_or_samples(
        self, texts: Texts, seed: int, notes: dict[str, Any], console: Console
    ) -> list[Document]:
        """The canary in the base's tokens; without sources what the base writes itself."""
        one = self.base
        if texts.canary.sources:
            return text_documents(texts.canary, one.tokenizer, self.longest)
        with console.status("sampling the canary from the base"), TemporaryDirectory() as scratch:
            return sampled_documents(
                one.model,
                one.tokenizer,
                rows=texts.canary.max_documents,
                max_length=self.longest,
                seed=seed,
                keep=Path(scratch) / "canary.json",
                notes=notes,
            )


def load_pair(base: str, tuned: str, tokenizer: str | None, dtype: Dtype, console: Console) -> Pair:
    """Load both.

    Raises:
        RequestError: one cannot be loaded, an adapter was made for another base, or the two are
            the same weights.
    """
    with console.status(f"loading {base}"):
        first = load_checkpoint("BASE", base, tokenizer, dtype)
    with console.status(f"loading {tuned}"):
        require_made_for(first, tuned, dtype)
        last = load_checkpoint("TUNED", tuned, tokenizer, dtype)
    shas = models.hash_weights(first.model), models.hash_weights(last.model)
    if shas[0] == shas[1]:
        raise RequestError(
            f"BASE '{base}' and TUNED '{tuned}' are the same weights (sha256 {shas[0][:12]}), so "
            "nothing was changed and there is nothing to judge; give the model as it was before, "
            "and as it is after"
        )
    return Pair(first, last, *shas)


def readers(
    pair: Pair,
    texts: Texts,
    items: list[Item],
    seed: int,
    notes: dict[str, Any],
    console: Console,
) -> tuple[tuple[Measure, Measure], bool]:
    """What reads the base, what reads the tuned model, and whether both see the same tokens.

    Raises:
        RequestError: the tokenizers differ, and an item or the base's samples cannot be compared.
    """
    one, other = pair.base.tokenizer, pair.tuned.tokenizer
    documents = pair.texts_or_samples(texts, seed, notes, console)
    if texts.canary.sources:
        alike = _ids(documents) == _ids(text_documents(texts.canary, other, pair.longest))
    else:
        alike = pair.same_vocabulary()
    if alike and all(_ids_of(one, item) == _ids_of(other, item) for item in items):
        mine, yours = (
            texts.measure(tokenizer, documents, items, pair.longest) for tokenizer in (one, other)
        )
        return (mine, yours), True
    notes["tokenizers"] = DIFFERENT
    refused = sorted({item.probe for item in items if item.kind not in GENERATED})
    if refused:
        raise RequestError(
            f"probes: {', '.join(refused)}: scored by likelihood, which cannot be compared where "
            "the tokenizers of BASE and TUNED differ; leave their files out, or give items of kind "
            "exact"
        )
    if not texts.canary.sources:
        raise RequestError(
            "the tokenizers of BASE and TUNED differ, so the base's own samples cannot be read by "
            "both; give text that both can read: --canary FILE"
        )
    both = shared_documents(texts.canary, (one, other), pair.longest)
    mine, yours = (
        texts.measure(tokenizer, documents, items, pair.longest, alike=False)
        for tokenizer, documents in zip((one, other), both, strict=True)
    )
    return (mine, yours), False


def in_bits(readings: Iterable[Reading]) -> list[Reading]:
    """The canary in bits per byte in place of nats a token; probes as they are."""
    return [
        replace(reading, meter="canary", tags=("canary",))
        if reading.meter == "canary_bits"
        else reading
        for reading in readings
        if reading.meter != "canary"
    ]


def decided(
    before: Sequence[Reading], after: Sequence[Reading], gate: Gate, alike: bool
) -> GateResult:
    """The gate's result; across tokenizers a PASS is INCONCLUSIVE."""
    result = decide(before, after, gate)
    if alike or result.verdict is not Verdict.PASS:
        return result
    unsure = Verdict.INCONCLUSIVE
    return replace(result, verdict=unsure, reason=f"{unsure}: {DIFFERENT}.")


def require_free(out: Path | None) -> None:
    """Refuse a folder that is in use before anything is computed; it is not made here."""
    if out is None:
        return
    if files := [parent for parent in out.parents if parent.is_file()]:
        raise RequestError(f"--out: '{out}' cannot be made: '{files[0]}' is a file; give a folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        RunFolder.create(out)  # says what is wrong
    require_writable(out)


@contextmanager
def written(out: Path) -> Iterator[RunFolder]:
    """A new folder that is there once all is in it."""
    require_free(out)  # something may have been put there while we read
    out = out.absolute()
    with full_disk_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with RunFolder(out.parent).replacing(out.name) as temporary:
        yield RunFolder(temporary)


def asked(texts: Texts, **names: str) -> dict[str, Any]:
    """What was asked for, in a report's place of the recipe."""
    canary = texts.canary.model_dump(mode="json")
    lesson = [source.model_dump(mode="json") for source in texts.lesson]
    found: dict[str, Any] = {**names, "canary": canary, "probes": list(texts.probes)}
    return {**found, "lesson": lesson} if lesson else found


def versions() -> dict[str, str]:
    """Of what computed the readings."""
    return {name: version(name) for name in ("holdfast", "torch", "transformers")}


def title(path: str) -> str:
    """A folder by its last part, a hub id whole."""
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.exists() else path


def _ids(documents: Iterable[Document]) -> list[list[int]]:
    return [document.text.input_ids for document in documents]


def _ids_of(tokenizer: Any, item: Item) -> list[list[int]]:
    """The tokens of each text of an item; of a chat without its template, which is the model's."""
    chat = [] if isinstance(item.prompt, str) else [str(t.get("content")) for t in item.prompt]
    prompt = [item.prompt] if isinstance(item.prompt, str) else chat
    words = [*prompt, *(item.prompts or ()), *(item.choices or ()), *item.targets]
    found: list[list[int]] = tokenizer(words, add_special_tokens=False)["input_ids"]
    return found
