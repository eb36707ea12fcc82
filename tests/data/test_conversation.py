"""Chat templates: which tokens are the assistant's, for templates of every temper."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest

from holdfast.data.chat import EncodeReport, Example, encode
from holdfast.data.row_checks import formats_of
from holdfast.data.rows import Row
from holdfast.errors import RequestError

Make = Callable[..., Any]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the thinking stays in the last answer only.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's: the prompt at inference ends with an empty thought that a full answer lacks.
EMPTY_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<none>{% endif %}")
COUNTING = "{{ messages | length }}" + CHATML
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)
WITH_TOOLS = "{% if tools %}[{{ tools[0].name }}]{% endif %}{{ mood }}" + CHATML


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TWO_TURNS = [user("a"), assistant("b"), user("c"), assistant("d")]


def documents(
    content: dict[str, Any], tokenizer: Any, report: EncodeReport | None = None
) -> list[Example]:
    row = Row("x.jsonl line 3", content, formats_of(content)[0])
    return encode(row, tokenizer, max_length=1000, report=report)


def learned(example: Example, tokenizer: Any) -> list[str]:
    """The text of each uninterrupted run of learned tokens."""
    parts: list[list[int]] = [[]]
    for token, bit in zip(example.input_ids, example.loss_mask, strict=True):
        if bit:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [tokenizer.decode(part) for part in parts if part]


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>")], ids=["none", "marked"]
)
def test_every_assistant_turn_is_learned_with_its_end(
    make_tokenizer: Make, template: str, end: str
) -> None:
    tokenizer = make_tokenizer(template, eos_token="<|im_end|>")
    (example,) = documents({"messages": TWO_TURNS}, tokenizer)
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=True)
    assert example.input_ids == whole["input_ids"]
    assert learned(example, tokenizer) == [f"b{end}", f"d{end}"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["none", "marked"])
def test_only_the_completion_of_a_conversational_row_is_learned(
    make_tokenizer: Make, template: str
) -> None:
    tokenizer = make_tokenizer(template, eos_token="<|im_end|>")
    content = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    (example,) = documents(content, tokenizer)
    assert [text.strip() for text in learned(example, tokenizer)] == ["d<|im_end|>"]


def test_a_template_without_generation_prompt_teaches_its_header_too(
    make_tokenizer: Make,
) -> None:
    tokenizer = make_tokenizer(PLAIN, eos_token="</s>")
    (example,) = documents({"messages": TWO_TURNS[:2]}, tokenizer)
    assert learned(example, tokenizer) == ["assistant: b\n"]


@pytest.mark.parametrize("text", [" spaced", "   ", "trailing ", "naïve 日本 🙂", "\n\nb\n"])
def test_spaces_and_many_byte_letters_are_marked_exactly(make_tokenizer: Make, text: str) -> None:
    """Against another way of marking: tokenize the text before, in and after the turn apart."""
    from tokenizers import processors

    tokenizer = make_tokenizer(CHATML, eos_token="<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (example,) = documents({"messages": [user(" q "), assistant(text), user("r")]}, tokenizer)
    parts = [
        "<|im_start|>user\n q <|im_end|>\n<|im_start|>assistant\n",
        f"{text}<|im_end|>\n",
        "<|im_start|>user\nr<|im_end|>\n",
    ]
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert example.input_ids == list(chain(*ids))
    bits = [[bit] * len(part) for bit, part in zip((False, True, False), ids, strict=True)]
    assert example.loss_mask == list(chain(*bits))


def test_a_slow_tokenizer_marks_the_same_tokens(
    make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(MARKED, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    (fast,) = documents({"messages": TWO_TURNS}, tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    (slow,) = documents({"messages": TWO_TURNS}, tokenizer)
    assert slow == fast


def test_a_template_that_strips_thinking_is_unrolled(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(THINKING, eos_token="<|im_end|>")
    messages = [
        user("a"),
        assistant("b", reasoning_content="hm"),
        user("c"),
        assistant("d", reasoning_content="ah"),
    ]
    report = EncodeReport()
    first, second = documents({"messages": messages}, tokenizer, report)
    # Each document is what the model is given at inference, and the answer it should give.
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first.input_ids) == prompt + "<think>hm</think>b<|im_end|>\n"
    assert learned(first, tokenizer) == ["<think>hm</think>b<|im_end|>\n"]
    assert tokenizer.decode(second.input_ids) == (
        prompt + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        "<think>ah</think>d<|im_end|>\n"
    )
    assert learned(second, tokenizer) == ["<think>ah</think>d<|im_end|>\n"]
    assert (report.rows, report.examples, report.unrolled) == (1, 2, 1)


def test_one_answer_is_not_unrolled(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(THINKING, eos_token="<|im_end|>")
    report = EncodeReport()
    messages = [user("a"), assistant("b", reasoning_content="hm")]
    (example,) = documents({"messages": messages}, tokenizer, report)
    assert learned(example, tokenizer) == ["<think>hm</think>b<|im_end|>\n"]
    assert report.unrolled == 0


def test_a_prompt_that_ends_otherwise_at_inference_is_counted(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(EMPTY_THOUGHT, eos_token="<|im_end|>")
    report = EncodeReport()
    (example,) = documents({"prompt": "a", "completion": "b"}, tokenizer, report)
    assert learned(example, tokenizer) == ["b<|im_end|>\n"]
    assert report.prompt_mismatch == 1


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (COUNTING, TWO_TURNS, r"changes the turns before .* \(message 1\)"),
        (ALTERNATING, [user("a"), user("b"), assistant("c")], "refuses .*roles must alternate"),
        (CHATML, [assistant("a"), user("b")], "begins with an assistant turn"),
        ("{{ messages[0].content + 1 }}", TWO_TURNS, "refuses this conversation"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    make_tokenizer: Make, template: str, messages: list[dict[str, Any]], expected: str
) -> None:
    with pytest.raises(RequestError, match=rf"x\.jsonl line 3: .*{expected}"):
        documents({"messages": messages}, make_tokenizer(template, eos_token="</s>"))


def test_no_assistant_turn_is_nothing_to_learn(chatml: Any) -> None:
    report = EncodeReport()
    assert documents({"messages": [user("a")]}, chatml, report) == []
    assert report.dropped_no_response == 1


@pytest.mark.parametrize("tools", [[{"name": "clock"}], '[{"name": "clock"}]'])
def test_tools_and_settings_reach_the_template(make_tokenizer: Make, tools: Any) -> None:
    tokenizer = make_tokenizer(WITH_TOOLS, eos_token="<|im_end|>")
    content = {
        "messages": TWO_TURNS[:2],
        "tools": tools,
        "chat_template_kwargs": {"mood": "calm"},
    }
    (example,) = documents(content, tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("[clock]calm<|im_start|>user")
