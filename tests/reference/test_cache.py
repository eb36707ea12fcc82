"""A cache says what the base says, to within its rounding, and nothing that is damaged or stale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from holdfast import model as models
from holdfast.divergence import Divergence
from holdfast.errors import RequestError
from holdfast.objective import SparseBase, token_losses
from holdfast.reference import build as building
from holdfast.reference.build import build, merge
from holdfast.reference.cache import Cached, Identity, Manifest, check
from holdfast.reference.encoding import Settings

ROWS = [[(7 * i + 3 * j * j) % tiny.VOCABULARY for j in range(4 + i)] for i in range(12)]
FINE = Settings(mass=0.9, max_entries=24, draws=0, resolution=32768)
SMALL = 40
"""Positions of a part and of a block in tests, so that there are several."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PART_POSITIONS", SMALL)
    monkeypatch.setattr(building, "BLOCK_POSITIONS", SMALL // 2)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny.tiny("Llama")


@pytest.fixture(scope="module")
def identity(base: Any) -> Identity:
    return Identity.of(base, tiny.letters(tiny.CHAT))


def packed(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Documents end to end with padding behind: ids, positions, and every predicted position."""
    ids = [token for row in rows for token in row] + [tiny.PAD] * 3
    positions = [i for row in rows for i in range(len(row))] + [0, 1, 2]
    wanted = [i < len(row) - 1 for row in rows for i in range(len(row))] + [False] * 3
    return (
        torch.tensor([ids, ids]),
        torch.tensor([positions, positions]),
        torch.tensor([wanted, wanted]),
    )


def plain(base: Any, rows: list[list[int]], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (M, V) by the model's own forward pass, a row at a time."""
    with torch.no_grad():
        logits = [base(input_ids=torch.tensor([row])).logits[0, :-1] for row in rows]
    return (torch.cat(logits).double() / temperature).log_softmax(-1)


def position_of(found: SparseBase) -> torch.Tensor:
    """(E,) the position of each entry."""
    return torch.repeat_interleave(torch.arange(len(found.log_tail)), found.offsets.diff())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_read_is_what_the_base_says(
    tmp_path: Path, base: Any, identity: Identity, temperature: float
) -> None:
    """Expected: the model's own logits, sorted and cut in plain torch."""
    wanted = replace(FINE, temperature=temperature)
    identity = replace(identity, temperature=temperature)
    build(base, ROWS, tmp_path / "c", identity, wanted)
    rows = [ROWS[9], ROWS[2], ROWS[5]]
    found = Cached.open(tmp_path / "c", identity).view(*packed(*rows))
    logp = plain(base, rows, temperature).repeat(2, 1)
    following = [token for row in rows for token in row[1:]] * 2
    for m, expected in enumerate(logp):
        part = slice(found.offsets[m], found.offsets[m + 1])
        top = expected.sort(descending=True)
        count = int((top.values.exp().cumsum(0) < wanted.mass).sum()) + 1
        listed = {*top.indices[: min(count, wanted.max_entries)].tolist(), following[m]}
        assert set(found.ids[part].tolist()) == listed
        assert len(found.ids[part]) == len(listed)
        ids = sorted(listed)
        rest = [v for v in range(tiny.VOCABULARY) if v not in listed]
        by_id = found.ids[part].argsort()
        gap = found.logp[part][by_id].exp() - expected[ids].exp()
        assert gap.abs().max() < 1e-4
        assert abs(found.log_tail[m].exp() - expected[rest].exp().sum()) < 1e-3


def test_listed_and_tail_sum_to_one_however_coarse(
    tmp_path: Path, base: Any, identity: Identity
) -> None:
    build(base, ROWS, tmp_path, identity, Settings(mass=0.6, draws=8, resolution=16))
    found = Cached.open(tmp_path, identity).view(*packed(*ROWS))
    assert found.weights is not None
    listed = found.logp.double().exp() * (found.weights == 0)
    total = found.log_tail.double().exp().index_add(0, position_of(found), listed)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_no_entry_is_stored_twice_at_a_position(
    tmp_path: Path, base: Any, identity: Identity
) -> None:
    build(base, ROWS, tmp_path, identity, Settings(mass=0.3, draws=40))
    found = Cached.open(tmp_path, identity).view(*packed(*ROWS))
    pairs = torch.stack([position_of(found), found.ids])
    assert pairs.unique(dim=1).shape == pairs.shape
    assert found.weights is not None
    assert (found.weights > 0).any()


def test_a_drawn_token_has_its_own_probability(
    tmp_path: Path, base: Any, identity: Identity
) -> None:
    """Expected: the model's own; also where few may be listed and likely ones are left over."""
    kept = Settings(mass=0.1, max_entries=1, draws=12)
    build(base, ROWS, tmp_path, identity, kept)
    found = Cached.open(tmp_path, identity).view(*packed(ROWS[8]))
    logp = plain(base, [ROWS[8]]).repeat(2, 1)[position_of(found), found.ids]
    assert found.weights is not None
    drawn = found.weights > 0
    assert drawn.any()
    assert (found.logp - logp)[drawn].abs().max() < 1 / 16 + 1e-3  # half a step of the ratios
    pi = (kept.draws * logp.exp())[drawn]
    assert (pi <= 1).all()
    assert (found.weights[drawn] * pi).log().abs().max() < 1 / 16 + 1e-3
    assert (found.logp - logp)[~drawn].exp().sub(1).abs().max() < 0.2


def test_sums_over_the_drawn_estimate_the_tail_without_bias(base: Any) -> None:
    """Expected: sums over all of the tail. 4000 independent draws; 5 standard errors."""
    start = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp = plain(base, [ROWS[5]])[3]
    drawn = building._draw(logp.expand(4000, -1), start, 8)
    pi = (8 * logp.exp()).clamp(max=1)
    value = torch.randn(len(logp), generator=torch.Generator().manual_seed(1)).double() * logp.exp()
    sums = (drawn * value / pi).sum(1)
    assert abs(sums.mean() - value.sum()) < 5 * sums.std() / 4000**0.5
    assert sums.std() > 0
    counts = drawn.sum(1)
    assert counts.min() >= pi.sum().floor()
    assert counts.max() <= pi.sum().ceil()


def gradient(base: Any, found: SparseBase, rows: list[list[int]]) -> torch.Tensor:
    """D sum KL / d hidden at the base itself: what an untouched student is pulled by."""
    ids, positions, wanted = packed(*rows)
    with torch.no_grad():
        hidden = models.hidden_states(base, ids, positions)[wanted]
    hidden = hidden.double().requires_grad_()
    head = models.head(base)
    head = replace(head, weight_VH=head.weight_VH.detach().double())
    every = torch.ones(len(hidden), dtype=torch.bool)
    targets = ids.roll(-1, 1)[wanted]
    asked = {"nll_N": ~every, "kl_N": every, "base": found, "divergence": Divergence()}
    token_losses(hidden, head, targets, **asked)[1].sum().backward()
    assert hidden.grad is not None
    return hidden.grad


def test_at_zero_drift_the_gradient_is_that_of_rounding_alone(
    tmp_path: Path, base: Any, identity: Identity
) -> None:
    """Expected: it falls with the resolution; a renormalised top-k would leave it where it is."""
    sizes = {}
    for resolution in (64, 1024, 16384):
        settings = replace(FINE, mass=0.7, resolution=resolution)
        build(base, ROWS, tmp_path / str(resolution), identity, settings)
        found = Cached.open(tmp_path / str(resolution), identity).view(*packed(*ROWS))
        sizes[resolution] = float(gradient(base, found, ROWS).norm())
        if resolution == 16384:
            cut = replace(found, log_tail=torch.full_like(found.log_tail, -torch.inf))
            renormalised = float(gradient(base, cut, ROWS).norm())
    assert sizes[1024] < sizes[64] / 4
    assert sizes[16384] < sizes[1024] / 4
    assert renormalised > 100 * sizes[16384]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, tiny.VOCABULARY - 1), min_size=2, max_size=9), min_size=1),
    st.integers(1, 24),
    st.integers(0, 20),
    st.data(),
)
def test_every_position_of_every_row_is_found(
    rows: list[list[int]], most: int, draws: int, data: st.DataObject
) -> None:
    """Any rows in any order, cut to any positions: the same as those positions of the whole."""
    import tempfile

    base = tiny.tiny("Llama")
    mine = Identity.of(base, tiny.letters())
    with tempfile.TemporaryDirectory() as folder:
        kept = Settings(mass=0.8, max_entries=most, draws=draws)
        build(base, rows, Path(folder), mine, kept)
        cache = Cached.open(folder, mine)
        ids, positions, wanted = packed(*data.draw(st.permutations(rows)))
        whole = cache.view(ids, positions, wanted)
        chosen = wanted & torch.rand(wanted.shape).lt(0.5)
        some = cache.view(ids, positions, chosen)
    at = chosen[wanted]
    inside = at[position_of(whole)]
    assert torch.equal(some.ids, whole.ids[inside])
    assert torch.equal(some.logp, whole.logp[inside])
    assert torch.equal(some.log_tail, whole.log_tail[at])
    first = whole.ids[whole.offsets[:-1]]
    assert torch.equal(first, ids.roll(-1, 1)[wanted])


def test_a_row_that_is_not_in_it_is_named(tmp_path: Path, base: Any, identity: Identity) -> None:
    build(base, ROWS, tmp_path, identity, FINE)
    cache = Cached.open(tmp_path, identity)
    cache.require(ROWS)
    with pytest.raises(RequestError, match=r"a row of 5 tokens that begins with ids 4, 4, 4, 4, 4"):
        cache.view(*packed(ROWS[3], [4] * 5))
    with pytest.raises(RequestError, match=r"begins with ids 4, 4.*one of 2 such rows"):
        cache.require([ROWS[0], [4] * 5, [5] * 5])
    reading = Cached.open(tmp_path, identity, tiny.letters())
    with pytest.raises(RequestError, match=r"begins with 'cccc' is not in it"):
        reading.require([[4] * 4])


CHANGES: dict[str, Callable[[Identity], Identity]] = {
    "model weights": lambda one: replace(one, weights="0" * 64),
    "tokenizer": lambda one: replace(one, tokenizer="1" * 64),
    "chat template": lambda one: replace(one, template="2" * 64),
    "temperature": lambda one: replace(one, temperature=2.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_stale_cache_is_refused_with_what_differs(
    tmp_path: Path, base: Any, identity: Identity, what: str
) -> None:
    build(base, ROWS[:3], tmp_path, identity, FINE)
    with pytest.raises(RequestError, match=f"its {what} ") as refused:
        Cached.open(tmp_path, CHANGES[what](identity))
    assert len(refused.value.problems) == 1


def test_the_identity_follows_weights_tokenizer_and_template(base: Any) -> None:
    one = Identity.of(base, tiny.letters(tiny.CHAT))
    assert one == Identity.of(base, tiny.letters(tiny.CHAT))
    other = Identity.of(tiny.tiny("Llama", seed=1), tiny.letters(eos_token="</s>", pad_token="."))
    assert one.weights != other.weights
    assert one.tokenizer != other.tokenizer
    assert one.template != other.template
    assert one.tokenizer == Identity.of(base, tiny.letters()).tokenizer
    again = tiny.tiny("Llama", rope_theta=123.0)
    assert Identity.of(again, tiny.letters(tiny.CHAT)).weights != one.weights


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"max_entries": 0}, "max_entries: 0"),
        ({"max_entries": 129}, "max_entries: 129"),
        ({"mass": 0.0}, "mass: 0"),
        ({"mass": 1.0}, "mass: 1"),
        ({"temperature": 0.0}, "temperature: 0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"draws": -1}, "draws: -1"),
        ({"resolution": 1}, "resolution: 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        Settings(**bad)
    assert len(refused.value.problems) == 1


def test_every_flipped_byte_is_named(tmp_path: Path, base: Any, identity: Identity) -> None:
    """Every 29th byte of a file in turn: header, pages, footer, manifest."""
    build(base, ROWS, tmp_path, identity, FINE)
    view = packed(*ROWS)
    for name in ("part-00001.parquet", "cache.json"):
        file = tmp_path / name
        sound = file.read_bytes()
        for at in range(3, len(sound), 29):
            broken = bytearray(sound)
            broken[at] ^= 0x10
            file.write_bytes(broken)
            with pytest.raises(RequestError, match=name):
                check(tmp_path)
            with pytest.raises(RequestError):
                Cached.open(tmp_path, identity).view(*view)
        file.write_bytes(sound)
    check(tmp_path)


@pytest.mark.parametrize("name", ["part-00001.parquet", "cache.json"])
def test_a_truncated_or_missing_file_is_named(
    tmp_path: Path, base: Any, identity: Identity, name: str
) -> None:
    build(base, ROWS, tmp_path, identity, FINE)
    file = tmp_path / name
    sound = file.read_bytes()
    for length in (0, 3, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:length])
        with pytest.raises(RequestError, match=name):
            Cached.open(tmp_path, identity)
    file.unlink()
    with pytest.raises(RequestError, match=name):
        Cached.open(tmp_path, identity)


def test_an_interrupted_build_computes_only_what_is_missing(
    tmp_path: Path, base: Any, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(base, ROWS, tmp_path / "at once", identity, FINE)
    assert len(whole.parts) >= 3
    computed: list[int] = []
    plain_store = building.store_batch

    def counted(model: Any, documents: Any, settings: Settings) -> Any:
        computed.append(len(documents))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return plain_store(model, documents, settings)

    monkeypatch.setattr(building, "store_batch", counted)
    folder = tmp_path / "twice"
    with pytest.raises(KeyboardInterrupt):
        build(base, ROWS, folder, identity, FINE)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["part-00000.parquet", "part-00001.parquet"]
    (folder / left[0]).write_bytes((folder / left[0]).read_bytes()[:-40])  # and one is damaged
    build(base, ROWS, folder, identity, FINE)
    assert len(computed) == 3 + len(whole.parts) - 1
    assert Manifest.read(folder) == whole
    build(base, ROWS, folder, identity, FINE)
    assert len(computed) == 3 + len(whole.parts) - 1
    with pytest.raises(RequestError, match=r"part of another cache; give a folder"):
        build(base, ROWS[1:], folder, identity, FINE)


def shards(folder: Path, base: Any, identity: Identity, n: int) -> list[Path]:
    folders = [folder / f"s{i}" for i in range(1, n + 1)]
    for i, one in enumerate(folders, 1):
        build(base, ROWS, one, identity, FINE, shard=(i, n))
    return folders


@pytest.mark.parametrize("n", [2, 9])
def test_merged_shards_are_the_cache_built_at_once(
    tmp_path: Path, base: Any, identity: Identity, n: int
) -> None:
    """Also where there are more shards than parts, so that some have nothing to do."""
    whole = build(base, ROWS, tmp_path / "whole", identity, FINE)
    folders = shards(tmp_path, base, identity, n)
    with pytest.raises(RequestError, match=rf"is shard 2 of {n}; join them"):
        Cached.open(folders[1], identity)
    assert merge(folders[::-1], tmp_path / "merged") == whole
    for name in whole.parts:
        merged = (tmp_path / "merged" / name).read_bytes()
        assert merged == (tmp_path / "whole" / name).read_bytes()
    assert merge(folders, tmp_path / "merged") == whole  # as after an interruption
    check(tmp_path / "merged")


def test_shards_that_do_not_make_a_whole_are_refused(
    tmp_path: Path, base: Any, identity: Identity
) -> None:
    first, second = shards(tmp_path, base, identity, 2)
    shutil.copytree(first, tmp_path / "again")
    other = tmp_path / "other"
    build(base, ROWS, other, replace(identity, weights="f" * 64), FINE, shard=(2, 2))
    rows = tmp_path / "rows"
    build(base, ROWS[2:], rows, identity, FINE, shard=(2, 2))
    out = tmp_path / "out"
    for given_shards, said in (
        ([first], "shard 2/2 is missing"),
        ([first, second, tmp_path / "again"], "are both shard 1/2"),
        ([first, other], "its model weights"),
        ([first, rows], "different rows"),
        ([], "give the folders"),
    ):
        with pytest.raises(RequestError, match=said):
            merge(given_shards, out)
        assert not out.exists()


def test_levels_come_back(tmp_path: Path) -> None:
    """Each level is the nearest to its own probability; only a mass of 0 is level 0."""
    for resolution in (16, 512, 32768):
        settings = Settings(resolution=resolution)
        table = settings.log_levels
        assert (settings.level(table) == np.arange(len(table))).all()
        assert (np.diff(table) > 0).all()
        p = np.linspace(1e-4, 1, 999)
        error = np.abs(np.exp(table[settings.level(np.log(p))]) - p)
        assert error.max() < 1 / resolution


def test_the_command_line_builds_checks_and_is_resumed(
    here: Path, holdfast: Callable[..., Any], quick: list[str]
) -> None:
    given_words = ["--model", "tiny", "--data", "lesson.jsonl", *quick, "--out", "c"]
    built = holdfast("cache", "build", *given_words, "--on", "both", "--json")
    assert built.code == 0, built.err
    said = json.loads(built.out)
    found = holdfast("cache", "check", "c", "--json")
    assert json.loads(found.out) == said
    assert said["positions"] > 0
    assert said["bytes_a_token"] == said["bytes"] / said["positions"]
    assert (here / "c" / "data" / "self_generated.json").is_file()
    assert "every checksum is right" in holdfast("cache", "check", "c").out
    for i in (1, 2):
        shard = f"{i}/2"
        out = holdfast("cache", "build", *given_words[:-1], f"s{i}", "--shard", shard)
        assert out.code == 0, out.err
    assert holdfast("cache", "merge", "s1", "s2", "--out", "m", "--json").code == 0


def test_a_cache_holds_what_a_budget_may_come_to_read(
    here: Path, holdfast: Callable[..., Any], quick: list[str]
) -> None:
    """Where the anchor's share may be raised, more of the old rows are read than at its start."""
    tiny.jsonl(here / "old.jsonl", [{"text": f"the cat sat on {n} mats"} for n in range(60)])
    words = ["--model", "tiny", "--data", "lesson.jsonl", *quick, "budget.forgetting=9%"]
    words += ["levers.replay.sources=[old.jsonl]", "levers.replay.fraction=0.1"]
    words += ["levers.kl_anchor.self_generated.fraction=0", "train.steps=12"]
    assert holdfast("cache", "build", *words, "--out", "c").code == 0
    done = holdfast("train", *words, "levers.kl_anchor.cache=c", "--out", "run")
    assert done.code in (0, 3, 4), done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-entries", "0"], "max_entries: 0"),
        (["--mass", "1"], "mass: 1"),
        (["--draws", "129"], "draws: 129"),
        (["--temperature", "0"], "temperature: 0"),
        (["--shard", "3/2"], "--shard: '3/2'"),
        (["--shard", "half"], "--shard: 'half'"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    here: Path, holdfast: Callable[..., Any], words: list[str], said: str
) -> None:
    out = holdfast("cache", "build", "--model", "tiny", "--data", "lesson.jsonl", *words)
    assert out.code == 2
    assert out.err.startswith(f"holdfast: {said}")
    assert out.err.count("\n") == 1
    assert not (here / "cache").exists()
