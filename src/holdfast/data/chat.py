"""A row becomes tokens, and it is known of each token whether it is learned.

How a document is built:

- **prompt + completion, no chat template**: BOS + prompt + completion + EOS. The two are
  tokenized apart, so no token straddles the boundary and the prompt's tokens are exactly those
  the model is given at inference. The completion and EOS are learned. (A SentencePiece tokenizer
  puts its word mark before the completion, as before any text.)
- **prompt + completion, chat template**: the prompt as a user turn, the completion as the
  assistant's, then as for messages; only the completion's turns are learned.
- **messages**: the tokenizer's chat template; every assistant turn is learned with its
  end-of-turn token (see `conversation`). Special tokens are the template's own.
- **text**: BOS + text + EOS, never templated; every token but the first is learned.

BOS and EOS are added if the tokenizer has them, and never twice. trl 1.16's SFTTrainer differs:
it tokenizes prompt + completion as one string and starts the loss where that departs from the
prompt alone; it prepends what calling the tokenizer prepends (no BOS with GPT-2's); it never wraps
plain prompt + completion in a chat template; and on messages it trains every token unless
``assistant_only_loss`` is set.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.data.conversation import Conversation, Rendered
from holdfast.data.cut import cut, split
from holdfast.data.example import EncodeReport, Example, Role
from holdfast.data.fingerprint import fingerprint
from holdfast.data.rows import Row
from holdfast.errors import RequestError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodeReport", "Example", "Role", "encode", "encode_all", "fingerprint"]


def encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    report: EncodeReport | None = None,
) -> list[Example]:
    """Tokenize one row into documents of at most ``max_length`` tokens.

    Mostly one document; several for a long text or an unrolled conversation; none if the row has
    nothing to learn. ``report``, if given, counts what became of the row.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    report = EncodeReport() if report is None else report
    report.rows += 1
    if row.format == "text":
        examples = _text(row, tokenizer, max_length, report)
    else:
        examples = list(_learnable(row, _documents(row, tokenizer), tokenizer, max_length, report))
    if not examples:
        report.dropped_no_response += 1
    for example in examples:
        report.add(example)
    return examples


def encode_all(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    cache_dir: Path,
    fingerprint: str,
) -> tuple[Dataset, EncodeReport]:
    """Tokenize rows once into a memory-mapped dataset; read it back when asked again.

    The dataset lies in ``cache_dir / fingerprint``. It is written beside and renamed when whole,
    so an interrupted run leaves nothing that could be mistaken for it, and of several processes
    that write at once one wins.

    Returns:
        The dataset, with columns ``input_ids`` (list of int32), ``loss_mask`` (list of bool),
        ``domain`` (string or null) and ``source_row`` (which of `rows` it is of, from 0), a row for
        each document; and what became of the rows.
    """
    from datasets import Dataset

    folder = cache_dir / fingerprint
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="unfinished-") as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            report = EncodeReport()
            examples = (
                (number, example)
                for number, row in enumerate(rows)
                for example in encode(row, tokenizer, max_length=max_length, report=report)
            )
            _write(examples, whole / "rows.arrow")
            (whole / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
            try:
                whole.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster: its copy is the same
                    raise
    stored = json.loads((folder / "report.json").read_text())
    return Dataset.from_file(str(folder / "rows.arrow")), EncodeReport(**stored)


def _documents(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """A row of messages or prompt + completion, tokenized whole."""
    content = row.content
    if row.format == "messages":
        return _templated(row, tokenizer, [], content["messages"])
    prompt, completion = content["prompt"], content["completion"]
    if not completion:
        return []
    if isinstance(prompt, list):
        return _templated(row, tokenizer, prompt, completion)
    if tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": prompt}]
        return _templated(row, tokenizer, asked, [{"role": "assistant", "content": completion}])
    given = _with_bos(_ids(tokenizer, prompt), tokenizer)
    learned = _with_eos(_ids(tokenizer, completion), tokenizer, row)
    return [Rendered(given + learned, [False] * len(given) + [True] * len(learned))]


def _templated(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, Any]],
    messages: list[dict[str, Any]],
) -> list[Rendered]:
    if tokenizer.chat_template is None:
        raise RequestError(
            f"{row.where}: holds messages, but the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has no chat template; "
            "give rows of prompt and completion, or choose a model with one"
        )
    return Conversation(
        prompt + messages,
        tokenizer,
        where=row.where,
        given=len(prompt),
        tools=row.content.get("tools"),
        settings=row.content.get("chat_template_kwargs"),
    ).documents()


def _learnable(
    row: Row,
    documents: list[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: EncodeReport,
) -> Iterator[Example]:
    """Cut each document to length, count what that cost, leave out what teaches nothing."""
    report.unrolled += len(documents) > 1
    for document in documents:
        mask = [False, *document.loss_mask[1:]]  # nothing predicts the first token
        if not any(mask):
            continue
        report.prompt_mismatch += document.prompt_mismatch
        kept = cut(document.input_ids, mask, max_length, tokenizer.bos_token_id)
        report.cut_prompt += kept.prompt
        report.cut_response += kept.response
        yield Example(kept.input_ids, kept.loss_mask, row.domain)


def _text(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, report: EncodeReport
) -> list[Example]:
    """Raw text, in as many documents as it takes; each begins with BOS."""
    if not row.content["text"].strip():
        return []
    body = _with_eos(_ids(tokenizer, row.content["text"]), tokenizer, row)
    bos = tokenizer.bos_token_id
    if bos is not None and body[0] == bos and len(body) > 1:
        body = body[1:]
    pieces = split(body, max_length - (bos is not None))
    documents = [_with_bos(piece, tokenizer) for piece in pieces]
    report.split += len(documents) > 1
    return [
        Example(ids, [False] + [True] * (len(ids) - 1), row.domain)
        for ids in documents
        if len(ids) > 1
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None and tokenizer.chat_template is None:
        raise RequestError(
            f"{row.where}: the tokenizer of {tokenizer.name_or_path or 'this model'} has neither "
            "an end-of-text token nor a chat template, so the model could never learn to stop; "
            "set tokenizer.eos_token and save the tokenizer again"
        )
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _write(examples: Iterator[tuple[int, Example]], file: Path) -> None:
    """Write numbered examples as an Arrow stream, a thousand at a time."""
    import pyarrow as pa

    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "loss_mask": pa.list_(pa.bool_()),
            "domain": pa.string(),
            "source_row": pa.int64(),
        }
    )
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        while some := list(islice(examples, 1000)):
            columns = [vars(example) | {"source_row": number} for number, example in some]
            stream.write_batch(pa.RecordBatch.from_pylist(columns, schema=schema))
