"""Options that several commands share, and what their words come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from holdfast.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from holdfast.checkpoint import Dtype
    from holdfast.pair import Texts

    Model = TypeVar("Model", bound=BaseModel)

DTYPES = ("auto", "float32", "bfloat16")

Canaries = Annotated[
    list[str] | None,
    typer.Option("--canary", help="Held-out text of the base's kind; may be given again."),
]
Probes = Annotated[
    list[str] | None, typer.Option("--probes", help="A file of items; may be given again.")
]
Lesson = Annotated[
    list[str] | None,
    typer.Option(
        "--lesson",
        help="Rows of what was taught, best not those trained on; may be given again. Then its "
        "loss, KL on it, over-application, label collapse and its experts are read too.",
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder or hub id of the tokenizer, where a model has none.")
]
Precision = Annotated[
    str, typer.Option("--dtype", help="Weights in memory: auto, float32 or bfloat16.")
]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-generated-code", help="Run what a model writes for code items, in a sandbox."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Margins = Annotated[
    list[str] | None,
    typer.Option(
        "--margin", help="Accepted fall, such as gsm8k=3pt or canary=1%; may be given again."
    ),
]


def texts_of(
    canary: list[str] | None,
    probes: list[str] | None,
    run_code: bool,
    lesson: list[str] | None = None,
) -> Texts:
    """What a model is read with."""
    from holdfast.data.rows import Source
    from holdfast.meters.canary import Canary
    from holdfast.pair import Texts

    taught = [Source(path=path) for path in lesson or ()]
    return Texts(Canary.model_validate({"sources": canary or []}), probes or [], run_code, taught)


def dtype_of(word: str) -> Dtype:
    """The precision that was named. Raises RequestError where it is none."""
    if word not in DTYPES:
        raise RequestError(f"--dtype: '{word}' is none; {did_you_mean(word, DTYPES)}")
    found: Any = word
    return found  # type: ignore[no-any-return]


def margins_of(words: list[str] | None) -> dict[str, str]:
    """NAME=AMOUNT words as a mapping. Raises RequestError where one is not of that form."""
    if faulty := [word for word in words or () if not all(word.partition("="))]:
        raise RequestError(f"--margin: '{faulty[0]}' is not NAME=AMOUNT; give one such as mmlu=2pt")
    pairs = (word.partition("=") for word in words or ())
    return {name: amount for name, _, amount in pairs}


def validated(section: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """A section of these values. Raises RequestError with every problem in them."""
    from pydantic import ValidationError

    from holdfast.explain import explain

    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RequestError(*explain(error, section, where=where)) from error
