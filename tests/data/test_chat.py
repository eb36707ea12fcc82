"""Rows to tokens: what is learned is read back from the tokens and compared with the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.data.chat import EncodeReport, Example, encode, encode_all, fingerprint
from holdfast.data.row_checks import formats_of
from holdfast.data.rows import Row, Source, iter_rows
from holdfast.errors import RequestError

Make = Callable[..., Any]


def row(content: dict[str, Any], domain: str | None = None) -> Row:
    return Row("x.jsonl line 1", content, formats_of(content)[0], domain)


def learned(example: Example, tokenizer: Any) -> str:
    """The text of the learned tokens, with a bar where learned tokens are interrupted."""
    parts: list[list[int]] = [[]]
    for token, bit in zip(example.input_ids, example.loss_mask, strict=True):
        if bit:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return "|".join(tokenizer.decode(part) for part in parts if part)


def one(content: dict[str, Any], tokenizer: Any, max_length: int = 1000) -> Example:
    (example,) = encode(row(content), tokenizer, max_length=max_length)
    assert len(example.input_ids) == len(example.loss_mask)
    return example


def test_prompt_and_completion_without_a_template(plain: Any) -> None:
    example = one({"prompt": "2+2=", "completion": "4"}, plain)
    assert plain.decode(example.input_ids) == "<s>2+2=4</s>"
    assert learned(example, plain) == "4</s>"


def test_prompt_and_completion_equal_their_parts_tokenized_apart(make_tokenizer: Make) -> None:
    """No token straddles the boundary, although the tokenizer would merge across it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    example = one({"prompt": "aba", "completion": "ba"}, tokenizer)
    assert example.input_ids == [2, 0, 1, 0, 3]
    assert example.loss_mask == [False, False, True, True, True]


def test_special_tokens_are_never_doubled(make_tokenizer: Make) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    assert tokenizer("a")["input_ids"] == [
        tokenizer.bos_token_id,
        *tokenizer("a", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    for content in (
        {"prompt": "a", "completion": "b"},
        {"prompt": "<s>a", "completion": "b</s>"},
        {"text": "<s>ab</s>"},
        {"text": "ab"},
    ):
        assert tokenizer.decode(one(content, tokenizer).input_ids) == "<s>ab</s>"


def test_no_bos_where_the_tokenizer_has_none(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    example = one({"text": "abc"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "abc</s>"
    assert learned(example, tokenizer) == "bc</s>"  # nothing stands before "a" to predict it


def test_no_end_and_no_template_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(RequestError, match=r"x\.jsonl line 1: .* neither an end-of-text token"):
        one({"text": "abc"}, make_tokenizer(bos_token="<s>"))


def test_text_is_learned_whole_and_never_templated(plain: Any, chatml: Any) -> None:
    assert learned(one({"text": "abc"}, plain), plain) == "abc</s>"
    assert chatml.decode(one({"text": "abc"}, chatml).input_ids) == "abc<|im_end|>"


def test_long_text_is_split_not_lost(plain: Any) -> None:
    report = EncodeReport()
    text = "abcdefghijklmnopqrstuvwxy"  # 25 bytes and EOS: 26 tokens in pieces of at most 9
    examples = encode(row({"text": text}, "az"), plain, max_length=10, report=report)
    assert [plain.decode(example.input_ids) for example in examples] == [
        "<s>abcdefgh",
        "<s>ijklmnopq",
        "<s>rstuvwxy</s>",
    ]
    assert all(example.domain == "az" for example in examples)
    assert all(
        example.loss_mask[1:] == [True] * (len(example.loss_mask) - 1) for example in examples
    )
    assert report == EncodeReport(rows=1, examples=3, tokens=29, response_tokens=26, split=1)


def test_every_cut_is_counted(plain: Any) -> None:
    report = EncodeReport()
    for prompt, completion in ((2, 20), (20, 2), (20, 20), (2, 2)):
        content = {"prompt": "p" * prompt, "completion": "c" * completion}
        (example,) = encode(row(content), plain, max_length=10, report=report)
        assert len(example.input_ids) <= 10
        assert example.input_ids[0] == plain.bos_token_id
    assert (report.cut_response, report.cut_prompt) == (2, 2)


@pytest.mark.parametrize(
    "content",
    [
        {"text": " \n"},
        {"prompt": "a", "completion": ""},
        {"prompt": [{"role": "user", "content": "a"}], "completion": []},
    ],
)
def test_a_row_with_nothing_to_learn_is_counted(content: dict[str, Any], plain: Any) -> None:
    report = EncodeReport()
    assert encode(row(content), plain, max_length=10, report=report) == []
    assert report == EncodeReport(rows=1, dropped_no_response=1)


def test_prompt_and_completion_become_a_conversation_where_there_is_a_template(
    chatml: Any,
) -> None:
    example = one({"prompt": "2+2=", "completion": "4"}, chatml)
    assert chatml.decode(example.input_ids) == (
        "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert learned(example, chatml) == "4<|im_end|>\n"


def test_messages_without_a_template_are_refused(plain: Any) -> None:
    with pytest.raises(RequestError, match="has no chat template; give rows of prompt and compl"):
        one({"messages": [{"role": "user", "content": "a"}]}, plain)


def lines(path: Path, *rows: dict[str, Any]) -> Source:
    path.write_text("".join(json.dumps(content) + "\n" for content in rows))
    return Source(path=str(path))


def test_encode_all_is_written_once_and_read_back(tmp_path: Path, plain: Any) -> None:
    source = lines(
        tmp_path / "x.jsonl", {"text": "abc", "domain": "letters"}, {"text": ""}, {"text": "de"}
    )
    key = fingerprint([source], plain, 16)
    options: dict[str, Any] = {"max_length": 16, "cache_dir": tmp_path / "c", "fingerprint": key}
    dataset, report = encode_all(iter_rows(source), plain, **options)
    expected = [
        vars(example) | {"source_row": number}
        for number, row in enumerate(iter_rows(source))
        for example in encode(row, plain, max_length=16)
    ]
    assert list(dataset) == expected
    assert dataset.features["input_ids"].feature.dtype == "int32"
    assert report.rows == 3
    assert report.dropped_no_response == 1

    def unread() -> Any:
        raise AssertionError("the rows were tokenized again")
        yield

    again, same = encode_all(unread(), plain, **options)
    assert again[:] == dataset[:]
    assert same == report


def test_an_interrupted_run_leaves_nothing_that_is_used(tmp_path: Path, plain: Any) -> None:
    def rows() -> Any:
        yield row({"text": "abc"})
        raise KeyboardInterrupt

    options: dict[str, Any] = {"max_length": 16, "cache_dir": tmp_path, "fingerprint": "key"}
    with pytest.raises(KeyboardInterrupt):
        encode_all(rows(), plain, **options)
    assert list(tmp_path.iterdir()) == []
    dataset, _ = encode_all([row({"text": "abc"}), row({"text": "de"})], plain, **options)
    assert len(dataset) == 2


def test_a_refusal_reaches_the_user_unwrapped(tmp_path: Path, plain: Any) -> None:
    rows = [row({"messages": [{"role": "user", "content": "a"}]})]
    with pytest.raises(RequestError, match="has no chat template"):
        encode_all(rows, plain, max_length=16, cache_dir=tmp_path, fingerprint="key")


def test_no_rows_make_an_empty_dataset(tmp_path: Path, plain: Any) -> None:
    dataset, report = encode_all([], plain, max_length=16, cache_dir=tmp_path, fingerprint="key")
    assert len(dataset) == 0
    assert report == EncodeReport()


def test_fingerprint_changes_with_every_input(tmp_path: Path, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    source = lines(tmp_path / "x.jsonl", {"text": "abc"})
    base = fingerprint([source], tokenizer, 16)
    tokenizer(["a", "bcd"], truncation=True, max_length=2)  # leaves a trace in the backend
    moved = lines(tmp_path / "y.jsonl", {"text": "abc"})
    assert fingerprint([source], tokenizer, 16) == base
    assert fingerprint([moved], tokenizer, 16) == base
    half = source.model_copy(update={"proportion": 0.5})
    assert fingerprint([half], tokenizer, 16) == base
    other = {
        fingerprint([source], tokenizer, 17),
        fingerprint([source, moved], tokenizer, 16),
        fingerprint([source], make_tokenizer(eos_token="<e>"), 16),
        fingerprint([source], make_tokenizer("{{ messages }}", eos_token="</s>"), 16),
        fingerprint([source.model_copy(update={"limit": 1})], tokenizer, 16),
        fingerprint([source.model_copy(update={"domain": "d"})], tokenizer, 16),
        fingerprint([lines(tmp_path / "z.jsonl", {"text": "abd"})], tokenizer, 16),
    }
    assert len(other | {base}) == 8


def test_fingerprint_of_a_folder_covers_every_file(tmp_path: Path, plain: Any) -> None:
    lines(tmp_path / "a.jsonl", {"text": "a"})
    before = fingerprint([Source(path=str(tmp_path))], plain, 16)
    lines(tmp_path / "b.jsonl", {"text": "b"})
    assert fingerprint([Source(path=str(tmp_path))], plain, 16) != before


def test_fingerprint_of_a_hub_dataset_is_its_revision(
    monkeypatch: pytest.MonkeyPatch, plain: Any
) -> None:
    class Builder:
        hash = "one"

    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, name: Builder)
    before = fingerprint([Source(path="someone/data")], plain, 16)
    assert fingerprint([Source(path="someone/data")], plain, 16) == before
    Builder.hash = "two"
    assert fingerprint([Source(path="someone/data")], plain, 16) != before
