"""An item as token ids, in lm-eval's way.

Context and continuation are tokenized as one text, and what follows the context's own tokens is the
continuation; white space that ends the context goes to the continuation (lm-eval 0.4, api/model.py,
`_encode_pair`). After a chat's generation prompt a continuation is tokenized on its own.

Departure: an item longer than the model's context is refused, where lm-eval cuts its beginning off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.errors import RequestError
from holdfast.meters.likelihood import Question
from holdfast.meters.probes.items import GENERATED, SHOWN, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = list[Question] | list[int]
"""An item's questions (one, or one for each prompt), or the prompt of a written answer."""


def encode_items(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], config: Any
) -> list[Encoded]:
    """Every item's tokens.

    Raises:
        RequestError: a chat without a template, a choice without a token, an item longer than the
            model's context; a line each.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9
    found: list[Encoded] = []
    problems: list[str] = []
    for item in items:
        try:
            encoded = encode(tokenizer, item)
        except RequestError as error:
            problems += error.problems
            continue
        length = _length(item, encoded)
        if length > context:
            writing = item.kind in GENERATED
            answer = f" with an answer of {item.max_new_tokens}" if writing else ""
            problems.append(
                f"{item.where}: {length} tokens{answer} do not fit the model's context of "
                f"{context}; shorten its prompt{' or its max_new_tokens' if writing else ''}, or "
                "leave it out"
            )
        found.append(encoded)
    if problems:
        more = len(problems) - SHOWN
        raise RequestError(*problems[:SHOWN], *([f"and {more} more items"] if more > 0 else []))
    return found


def encode(tokenizer: Any, item: Item) -> Encoded:
    """One item's tokens."""
    if item.kind in GENERATED:
        return _prompt(tokenizer, item, item.prompt)
    if item.choices is None:
        texts = [item.targets[0]]
    else:
        texts = [item.delimiter + choice for choice in item.choices]
    if item.prompts is not None:
        return [
            _question(tokenizer, item, prompt, [text])
            for prompt, text in zip(item.prompts, texts, strict=True)
        ]
    return [_question(tokenizer, item, item.prompt, texts)]


def _length(item: Item, encoded: Encoded) -> int:
    """Tokens that the model reads at most: the last one is written, not read."""
    longest = 0
    for part in encoded:
        if isinstance(part, Question):
            more = max(map(len, part.continuations))
            longest = max(longest, len(part.context) + more - 1)
    return longest or len(encoded) + item.max_new_tokens - 1


def _question(
    tokenizer: Any, item: Item, prompt: str | list[dict[str, Any]], texts: list[str]
) -> Question:
    if not isinstance(prompt, str):
        context = _prompt(tokenizer, item, prompt)
        after = [_ids(tokenizer, text) for text in texts]
    else:
        kept = prompt.rstrip()
        texts = [prompt[len(kept) :] + text for text in texts]
        context = _prompt(tokenizer, item, kept)
        if kept:
            after = [_prompt(tokenizer, item, kept + text)[len(context) :] for text in texts]
        else:
            after = [_ids(tokenizer, text) for text in texts]
    if not all(after):
        text = texts[after.index([])]
        raise RequestError(
            f"{item.where}: {text!r} is no token of its own after its prompt; give it another "
            "spelling, such as a space before it"
        )
    if not context:  # neither BOS nor EOS to go on from: the first token is given
        if len(texts) > 1 or len(after[0]) < 2:
            raise RequestError(
                f"{item.where}: its prompt is empty, and the tokenizer has neither BOS nor EOS to "
                "begin with; give it a prompt"
            )
        return Question(after[0][:1], [after[0][1:]])
    return Question(context, after)


def _prompt(tokenizer: Any, item: Item, prompt: str | list[dict[str, Any]]) -> list[int]:
    """The tokens of a prompt, with what begins a text; an empty one is BOS, or EOS where it is."""
    if not isinstance(prompt, str):
        if tokenizer.chat_template is None:
            raise RequestError(
                f"probes: item '{item.id}' of '{item.probe}' is a chat, but the tokenizer has no "
                "chat template; give its prompt as text, or set model.chat_template"
            )
        chat: list[int] = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        return chat
    bos = tokenizer.bos_token_id
    if not prompt:
        first = tokenizer.eos_token_id if bos is None else bos
        return [] if first is None else [first]
    if item.bos == "always":
        return ([] if bos is None else [bos]) + _ids(tokenizer, prompt)
    first_text = tokenizer.bos_token or tokenizer.eos_token
    given = first_text is not None and prompt.startswith(first_text)
    ids: list[int] = tokenizer(prompt, add_special_tokens=not given)["input_ids"]
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
