"""Text that the base writes itself: anchor rows, and a canary where the user has none.

Sampled from the model's own start, temperature 1, no truncation of the distribution (arXiv
2505.13811): a base model starts from BOS; a chat model is led to the point where a user would
speak, so that it writes the question, and then answers it. Generated once, kept, read ever after.

Row i draws with numbers of its own (`decode.write_on`). The rows are the first distinct ones: a
text that the base writes often stands there once, so short texts that it knows by heart are rarer
than it writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from holdfast import model as models
from holdfast.data.example import Example, Role
from holdfast.data.stream import Stream
from holdfast.errors import RequestError
from holdfast.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Engine = Literal["auto", "holdfast", "vllm"]
Write = Callable[[Sequence[list[int]], Sequence[int], Sequence[int], int], list[list[int]]]
"""(prompts, most new tokens of each, seed, number of the first row) -> what comes after each."""
ROUND = 512
"""Rows sampled before doubles are looked for."""
LEAST = 16
"""A round is no smaller; one that brings nothing new is the last."""
ATTEMPTS = 4
"""At most so many times the rows asked for are sampled, and one round."""
NEAR = 0.05
"""Nats a token by which two engines' likelihoods of one text may differ (bf16 kernels)."""
MARK = "\ue000"
"""A private-use character that no template contains: marks where the user's words would stand."""


def generate_stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    share: float,
    folder: Path,
    kept: Sequence[Path] = (),
    **settings: Any,
) -> Stream:
    """Anchor rows as a stream; for the settings see `generate`.

    Args:
        folder: the rows are kept there, under the stream's name.
        kept: other folders that may hold them already.
    """
    file = f"{name}.json"
    others = [other / file for other in kept]
    examples = generate(model, tokenizer, keep=folder / file, kept=others, **settings)
    return Stream.of(name, Role.ANCHOR, share, examples)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    keep: Path,
    kept: Sequence[Path] = (),
    engine: Engine = "auto",
    notes: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda _rows: None,
) -> list[Example]:
    """Sample `rows` different texts from the model as it stands (not yet wrapped in an adapter).

    Fewer where the model does not write that many; `notes` then says so, under the file's name.

    Args:
        max_new_tokens: a row has one token more at most; in a chat, the template's own tokens,
            question and answer share them.
        temperature: 1 is the model's own distribution.
        seed: seeds the sampling; the global generators are left as they were.
        keep: JSON file that holds the rows, read back when it was made with the same settings; it
            is the run's own, and so is the model (which is then not looked at).
        kept: other such files, of a cache for one: where `keep` holds no such rows, theirs are
            taken if they are of the same base, by its weights, and kept in `keep` too.
        engine: vllm samples with vLLM from `model.name_or_path`; the likelihoods it gives must be
            those of `model`. auto: vllm for a model on CUDA where vLLM is installed and agrees,
            else holdfast.
        progress: called with the number of different rows so far.

    Raises:
        RequestError: the tokenizer has no token to start from, the chat template leaves no room,
            or vLLM is asked for and is not installed or samples from another model.
    """
    settings = {
        "rows": rows,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "prefix": _start(tokenizer)[0],
    }
    found = _read(keep, settings)
    if found is not None:
        return _examples(found, keep, notes)
    base = models.hash_weights(model)
    for file in kept:
        found = _read(file, settings)
        if found is not None and found.get("base") == base:
            break
    else:
        found = {"settings": settings, "base": base}
        write, found["engine"] = _writer(engine, model, tokenizer, max_new_tokens + 1, temperature)
        found["rows"] = _distinct(write, tokenizer, rows, max_new_tokens, seed, progress)
    keep.parent.mkdir(parents=True, exist_ok=True)
    write_text(keep, json.dumps(found))
    return _examples(found, keep, notes)


def _examples(found: dict[str, Any], keep: Path, notes: dict[str, str] | None) -> list[Example]:
    """The rows of a file; a note where they are fewer than asked for."""
    texts, rows = found["rows"], found["settings"]["rows"]
    if len(texts) < rows and notes is not None:
        notes[keep.stem] = f"the base writes {len(texts)} different rows, {rows} were asked for"
    return [Example(ids, mask, "self_generated") for ids, mask in texts]


def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What the file holds, if it was made with these settings."""
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if found["settings"] == settings else None


def _start(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], bool]:
    """Tokens that stand before the first sampled one, and whether a user's words follow them."""
    if tokenizer.chat_template is not None:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False
        )
        before, found, _ = text.partition(MARK)
        if found and before:
            return tokenizer(before, add_special_tokens=False)["input_ids"], True
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token], False
    raise RequestError(
        "the tokenizer has neither BOS nor EOS token to start a text from; give replay.sources "
        "and set levers.kl_anchor.self_generated.fraction to 0"
    )


def _distinct(
    write: Write,
    tokenizer: Any,
    rows: int,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int], None],
) -> list[tuple[list[int], list[bool]]]:
    """The first `rows` different texts, in the order of their numbers; bounded, see `ATTEMPTS`."""
    found: dict[tuple[int, ...], tuple[list[int], list[bool]]] = {}
    tried, before = 0, -1
    while len(found) < rows and len(found) > before and tried < ATTEMPTS * rows:
        before = len(found)
        count = max(LEAST, min(ROUND, rows - len(found))) if tried else min(ROUND, rows)
        for ids, mask in _sample_rows(write, tokenizer, count, max_new_tokens, seed, tried):
            found.setdefault(tuple(ids), (ids, mask))
        tried += count
        progress(min(len(found), rows))
    return list(found.values())[:rows]


def _sample_rows(
    write: Write, tokenizer: Any, count: int, max_new_tokens: int, seed: int, first: int
) -> list[tuple[list[int], list[bool]]]:
    """Rows number `first` and the `count` - 1 after it."""
    start, chat = _start(tokenizer)
    rows = [start] * count
    longest = max_new_tokens + 1
    if chat:
        room = longest - len(start)
        if room < 4:
            raise RequestError(
                f"the chat template opens with {len(start)} tokens, which leaves no room in "
                f"self-generated rows of {longest}; raise data.max_length, or "
                "levers.kl_anchor.self_generated.max_new_tokens"
            )
        questions = write(rows, [room // 4] * count, [seed, 1], first)
        rows = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.strip()}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
            for question in tokenizer.batch_decode(questions, skip_special_tokens=True)
        ]
    rows = [row[:longest] for row in rows]
    answers = write(rows, [longest - len(row) for row in rows], [seed, 0], first)
    whole = [row + answer for row, answer in zip(rows, answers, strict=True)]
    return [(ids, [i >= len(start) for i in range(len(ids))]) for ids in whole]


# ---- engines


def _writer(
    engine: Engine, model: Any, tokenizer: Any, longest: int, temperature: float
) -> tuple[Write, Engine]:
    """What samples, and its name."""
    able = model.device.type == "cuda" and model.name_or_path and find_spec("vllm")
    if engine == "vllm" or (engine == "auto" and able):
        try:
            return _vllm(model, tokenizer, longest, temperature), "vllm"
        except (ImportError, _OtherModelError) as error:
            if engine == "vllm":
                raise RequestError(
                    f"engine: vllm cannot sample the base: {error}; install vllm and give a model "
                    "that lies on disk as it is in memory, or set engine to holdfast"
                ) from error
    from holdfast.decode import write_on

    def write(
        prompts: Sequence[list[int]], limits: Sequence[int], seed: Sequence[int], first: int
    ) -> list[list[int]]:
        return write_on(  # a limit of 0 writes nothing
            model,
            tokenizer,
            prompts,
            max_new_tokens=limits,
            temperature=temperature,
            seed=seed,
            first=first,
        )

    return write, "holdfast"


class _OtherModelError(Exception):
    """What vLLM loaded is not what is in memory."""


def _vllm(model: Any, tokenizer: Any, longest: int, temperature: float) -> Write:
    """Sampling with vLLM, from the folder or hub id that the model was loaded from.

    Raises:
        ImportError: vLLM is not installed.
        _OtherModelError: its likelihoods of its own text are not those of `model`, which may be a
            stage that was merged in memory.
    """
    import torch
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    from holdfast.decode import end_tokens

    lm = models.causal_lm(model)
    share = {}
    if lm.device.type == "cuda":  # the base lies on the same device
        free, total = torch.cuda.mem_get_info(lm.device)
        share["gpu_memory_utilization"] = 0.9 * free / total
    llm = LLM(
        model=lm.name_or_path,
        revision=getattr(lm.config, "_commit_hash", None),
        skip_tokenizer_init=True,
        dtype=str(lm.dtype).removeprefix("torch."),
        max_model_len=longest + 1,
        generation_config="vllm",  # none of the model's own sampling settings
        **share,
    )
    ends = end_tokens(lm, tokenizer)

    def sample(
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        seed: Sequence[int],
        first: int,
        temperature: float,
    ) -> list[Any]:
        params = [
            SamplingParams(
                temperature=temperature,
                top_k=-1,
                top_p=1.0,
                max_tokens=limit,
                stop_token_ids=ends,
                detokenize=False,
                logprobs=0,
                seed=int(np.random.SeedSequence([*seed, first + row]).generate_state(1)[0]),
            )
            for row, limit in enumerate(limits)
        ]
        found = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params)
        return [request.outputs[0] for request in found]

    start = _start(tokenizer)[0]
    length = min(16, longest - len(start))
    for out in sample([start] * 4, [length] * 4, [0, 2], 0, 1.0):
        ids = torch.tensor([[*start, *out.token_ids]], device=lm.device)
        with torch.inference_mode():
            logp = lm(input_ids=ids, use_cache=False).logits[0, len(start) - 1 : -1].float()
        ours = logp.log_softmax(-1).gather(1, ids[0, len(start) :, None]).mean()
        theirs = out.cumulative_logprob / len(out.token_ids)
        if abs(float(ours) - theirs) > NEAR:
            raise _OtherModelError(
                f"it gives a text {theirs:.2f} nats a token, the model in memory {float(ours):.2f}"
            )

    def write(
        prompts: Sequence[list[int]], limits: Sequence[int], seed: Sequence[int], first: int
    ) -> list[list[int]]:
        outs = sample(prompts, [max(1, n) for n in limits], seed, first, temperature)
        return [list(out.token_ids)[:n] for out, n in zip(outs, limits, strict=True)]

    return write
