"""The base is another stage, named by its path: a run, a model or an adapter, loaded frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast import model as models
from holdfast.errors import RequestError
from holdfast.lineage import locate
from holdfast.reference.frozen import Dtype, Frozen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "levers.kl_anchor.reference"


def stage(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    tuned: Any,
    dtype: Dtype = "auto",
    device: str | None = None,
) -> Frozen:
    """The stage at `path` as a reference for `tuned`.

    The two may have different numbers of embedding rows (padding), but not different tokens.

    Raises:
        RequestError: it cannot be loaded, or its tokens are others.
    """
    try:
        if locate(path).tokenizer is None:
            raise RequestError(f"model.path: '{path}' has no tokenizer to compare; save it there")
        # in float32, so that an adapter is merged exactly; the reference then rounds, if asked to
        settings = models.Model(path=path, dtype="float32")
        theirs = models.load_tokenizer(settings)
        check_tokens(path, tokenizer, theirs)
        loaded = models.load_model(settings, adapter=False, tokenizer=theirs)
    except RequestError as error:
        raise RequestError(*(p.replace("model.path", FIELD) for p in error.problems)) from error
    return Frozen(loaded, models.causal_lm(tuned).device, dtype, device)


def check_tokens(path: str, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Hold that every id is the same token in both. Raises RequestError where one is not."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    differing = sorted(t for t in mine.keys() | other.keys() if mine.get(t) != other.get(t))
    if differing:
        token = differing[0]
        raise RequestError(
            f"{FIELD}: '{path}' has another vocabulary ({len(other)} tokens against {len(mine)}; "
            f"'{token}' is {_id(other.get(token))} there and {_id(mine.get(token))} here), so its "
            "probabilities cannot be compared; give a stage with the tokenizer of model.path"
        )


def _id(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"
