"""What the user asked for: YAML, `key=value` words and keyword arguments become one frozen Recipe.

Every problem is reported at once, a line each, with the field, the value, what is allowed and a
value that works. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from holdfast.alarms.rules import Alarms
from holdfast.data.quality.finding import Quality
from holdfast.data.row_checks import shown
from holdfast.data.rows import Source
from holdfast.errors import RequestError, did_you_mean
from holdfast.explain import explain
from holdfast.gate.verdict import Gate
from holdfast.levers import Lever, levers
from holdfast.lineage import Stage, at_home, expanded, locate
from holdfast.meters.canary import Canary
from holdfast.meters.probes import Item, earlier_items, load_items
from holdfast.model import Model
from holdfast.section import Section

if TYPE_CHECKING:
    from holdfast.levers.adapter import Adapter
    from holdfast.levers.balance import Balance
    from holdfast.levers.budget import Budget
    from holdfast.levers.context_frozen import ContextFrozen
    from holdfast.levers.forgetting import Forgetting
    from holdfast.levers.kl_anchor import KlAnchor
    from holdfast.levers.replay import Replay

OFF_WORDS = ("none", "off")
OFF_SCHEMA = {"enum": [*OFF_WORDS, None, False]}


class Data(Section):
    """The lesson: what is to be learned."""

    sources: list[Source] = Field(min_length=1)
    """Files (.jsonl, .parquet), `datasets` folders or hub ids with messages, prompt + completion,
    or text rows."""
    heldout: float = Field(default=0.05, ge=0.0, lt=0.5)
    """Share of the lesson's rows kept out of training to measure learning (8 to 200 rows).
    0 turns it off."""
    max_length: int | None = Field(default=None, ge=16)
    """Longest sequence in tokens; empty: the model's context, at most 2048."""


class Train(Section):
    """How long, and in what pieces."""

    epochs: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Passes over the lesson; empty: 3, and up to 12 for a lesson so small that 3 make fewer than
    600 steps of 512 tokens. Ignored where `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; empty: from `epochs`."""
    batch_tokens: int | None = Field(default=None, ge=64)
    """Tokens of one optimizer step over all devices, lesson and anchor rows together; empty: a
    power of two that makes about 600 steps of the run, 512 to 16384."""
    micro_batch_tokens: int = Field(default=8192, ge=64)
    """Tokens of one forward pass on one device; below `batch_tokens` gradients accumulate."""
    order: Literal["herded", "random"] = "herded"
    """Of the rows within each stream. herded: each step has some of every kind, as their words say
    (`data/herding.py`). Another order every epoch, by the seed."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; empty: a tenth of the run, at least 20 steps."""
    measure_every: int | None = Field(default=None, ge=1)
    """Steps between canary readings while training, beside those of `keep`; empty: a fifth of the
    run."""
    keep: Literal["best", "last"] = "best"
    """Which weights are the artifact. best: of the checkpoints, the last step among them, the one
    of the best target that keeps every guardrail within its margin on the selection split (the
    canary; the probes, too, with `measure_probes`); the target is the held-out lesson, or with
    `measure_probes` the probes tagged target. Each checkpoint is read for it. last: where training
    ended, as always with a forgetting budget, which draws the last step back to within."""
    patience: int = Field(default=0, ge=0)
    """End training when so many checkpoints in a row were not better than the best by the rule of
    `keep`. 0 turns it off: the schedule ends at zero by itself."""
    measure_probes: bool = False
    """Read the probes, too, whenever the canary is read while training, on the half of their items
    that falls to the selection split; the gate then judges the other half alone. false: the gate
    has all items, and while training only the canary is watched."""
    run_generated_code: bool = False
    """Run what the model writes for code items, in a sandbox; without it they are refused."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers as transformers names them: tensorboard, wandb, mlflow, trackio."""


def _or(schema: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """A field's schema with other forms that it may be given in."""
    about: dict[str, Any] = {
        key: schema.pop(key) for key in ("description", "default") if key in schema
    }
    return {"anyOf": [schema, *others]} | about


def _with_off(schema: dict[str, Any]) -> None:
    """Tell editors that each lever may be `none`."""
    for name, field in schema["properties"].items():
        schema["properties"][name] = _or(field, OFF_SCHEMA)


class _LeversBase(Section):
    model_config = ConfigDict(json_schema_extra=_with_off)

    if TYPE_CHECKING:
        adapter: Adapter = Adapter()
        balance: Balance = Balance()
        context_frozen: ContextFrozen = ContextFrozen()
        kl_anchor: KlAnchor = KlAnchor()
        replay: Replay = Replay()
        budget: Budget = Budget()
        forgetting: Forgetting = Forgetting()

    @model_validator(mode="before")
    @classmethod
    def _none_is_off(cls, value: Any) -> Any:
        known = levers()
        if value is not None and _is_off(value):
            value = dict.fromkeys(known, "none")
        if not isinstance(value, Mapping):
            return value
        return {
            key: known[key].OFF if key in known and _is_off(entry) else entry
            for key, entry in value.items()
        }

    @property
    def other_share(self) -> float:
        """Share of each step's tokens that is not the lesson's."""
        anchor = self.kl_anchor
        return self.replay.share + (anchor.self_generated.fraction if anchor.anchored else 0.0)

    def active(self) -> tuple[Lever, ...]:
        """The levers in a fixed order (by name)."""
        return tuple(getattr(self, name) for name in type(self).model_fields)


def _is_off(entry: Any) -> bool:
    is_word = isinstance(entry, str) and entry.lower() in OFF_WORDS
    return is_word or entry is None or entry is False


if TYPE_CHECKING:
    Levers = _LeversBase
else:
    Levers = create_model(
        "Levers",
        __base__=_LeversBase,
        __doc__="What keeps the model's abilities; a file in holdfast/levers each.",
        **{
            key: (lever, Field(default=lever(), description=lever.__doc__))
            for key, lever in levers().items()
        },
    )


def _with_short_forms(schema: dict[str, Any]) -> None:
    """Tell editors of what may be given in short."""
    text, fields = {"type": "string"}, schema["properties"]
    shorts: dict[str, list[dict[str, Any]]] = {
        "model": [text],
        "data": [text, {"type": "array"}],
        "probes": [text],
        "levers": [OFF_SCHEMA],
        "alarms": [OFF_SCHEMA],
    }
    for name, others in shorts.items():
        fields[name] = _or(fields[name], *others)
    fields["budget"] = {
        "type": "object",
        "properties": {"forgetting": {"type": ["object", "string"]}},
        "additionalProperties": False,
        "description": "Short for levers.forgetting.budget, such as {forgetting: 1%}.",
    }


class Recipe(Section):
    """A whole run. `model` and `data` are all that must be given."""

    model_config = ConfigDict(json_schema_extra=_with_short_forms)

    model: Model
    """The base: a folder or hub id, or a section."""
    data: Data
    """The lesson: a file, a list of files, or a section."""
    out: str = "runs/latest"
    """The run folder; it must not exist yet, or be empty."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of every random choice: rows, generated text, adapter weights."""
    train: Train = Train()
    """How long, and in what pieces."""
    levers: Levers = Levers()
    """What keeps the model's abilities. `none` turns all of them off; so does `none` for one."""
    canary: Canary = Canary()
    """Held-out text that must stay as likely as before."""
    probes: list[str] = Field(default_factory=list)
    """JSONL files of probe items, measured before and after."""
    earlier_probes: bool = True
    """Whether the probes of the stages before are read here, too, where this one starts from the
    folder of a run: what was taught there must stay."""
    gate: Gate = Gate()
    """How much may be forgotten."""
    alarms: Alarms = Alarms()
    """What is watched while training goes on. `none` turns it off."""
    quality: Quality = Quality()
    """From when on `holdfast check-data` warns; training reads none of it."""

    @field_validator("model", mode="before")
    @classmethod
    def _model_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_paths(cls, value: Any) -> Any:
        return {"sources": _listed(value)} if isinstance(value, str | list) else value

    @field_validator("probes", mode="before")
    @classmethod
    def _probe_paths(cls, value: Any) -> Any:
        return _listed(value)

    @field_validator("out")
    @classmethod
    def _out_in_full(cls, value: str) -> str:
        return expanded(value)

    @field_validator("probes")
    @classmethod
    def _probes_in_full(cls, value: list[str]) -> list[str]:
        return [expanded(path) for path in value]

    @model_validator(mode="before")
    @classmethod
    def _budget_in_short(cls, value: Any) -> Any:
        """`budget: {forgetting: 1%}` as `levers: {forgetting: {budget: 1%}}`."""
        if not isinstance(value, Mapping) or not isinstance(value.get("budget"), Mapping):
            return value
        rest = {key: deepcopy(entry) for key, entry in value.items() if key != "budget"}
        if value["budget"].keys() != {"forgetting"}:
            raise ValueError(
                f"budget: {shown(dict(value['budget']))}; it holds forgetting and nothing else, "
                "such as {forgetting: 1%}; for the step's budget give levers.budget"
            )
        _assign(rest, ["levers", "forgetting", "budget"], value["budget"]["forgetting"], "budget")
        return rest

    @model_validator(mode="after")
    def _margins_of_budget(self) -> Self:
        """What may be forgotten is what the gate accepts, unless its margins say otherwise."""
        margins = {**self.levers.forgetting.budget, **self.gate.margins}
        if margins != self.gate.margins:
            object.__setattr__(self, "gate", self.gate.model_copy(update={"margins": margins}))
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        replay, anchor = self.levers.replay, self.levers.kl_anchor
        if replay.anchored and not anchor.anchored:
            raise ValueError(
                "levers.replay.loss: 'kl' needs levers.kl_anchor with weight above 0 and on: "
                "anchor or both; set levers.replay.loss: ntp to replay with next-token loss"
            )
        if self.levers.budget.kl_cap is not None and not anchor.anchored:
            raise ValueError(
                "levers.budget.kl_cap: is measured on anchor rows; set levers.kl_anchor.weight "
                "above 0 with on: anchor or both, or leave kl_cap out"
            )
        if self.train.patience and self.train.keep == "last":
            raise ValueError(
                "train.patience: counts checkpoints without a better one; set train.keep: best, or "
                "patience to 0"
            )
        if self.alarms.watches_accuracy and not (self.probes and self.train.measure_probes):
            raise ValueError(
                "alarms.fall: probes are watched only where their selection half is read while "
                "training; give probes and set train.measure_probes: true, or leave fall out"
            )
        shares = self.levers.other_share
        if shares >= 1:
            raise ValueError(
                f"levers.replay.fraction + levers.kl_anchor.self_generated.fraction: {shares:g} "
                "leaves no token for the lesson; keep the sum below 1, such as 0.2 and 0.25 "
                "(replay counts with its keep, counterexamples and earlier)"
            )
        if self.levers.adapter.four_bit and anchor.source(adapter=True)[0] == "frozen":
            raise ValueError(
                "levers.kl_anchor.reference: a base in 4 bits is not copied; leave it at auto, and "
                "reference_dtype and reference_device out"
            )
        if self.levers.context_frozen.enabled and self.train.activation_checkpointing:
            raise ValueError(
                "levers.context_frozen.enabled: the context is kept in a cache, which activation "
                "checkpointing drops; set train.activation_checkpointing: false"
            )
        if anchor.reference == "adapter_off" and self.levers.adapter.off:
            raise ValueError(
                "levers.kl_anchor.reference: 'adapter_off' needs an adapter; set it to frozen, or "
                "levers.adapter.method to lora"
            )
        return self

    def items(self) -> tuple[list[Item], list[Item], list[str]]:
        """Its own probe items, those of the stages before it, and what of these is not asked.

        Raises:
            RequestError: a file of them cannot be read.
        """
        own, stage = load_items(self.probes), self._stage()
        if stage is None or not self.earlier_probes:
            return own, [], []
        return own, *earlier_items(stage, own, run_code=self.train.run_generated_code)

    def _stage(self) -> Stage | None:
        """Where training starts; None where there is nothing, which whoever loads it says."""
        try:
            return locate(self.model.path, self.model.revision)
        except RequestError:
            return None

    def with_stage(self) -> Self:
        """The same with what came with the model, where it is left open.

        Mixer, lessons, canary, and the margins of the probes that are asked again.

        Raises:
            RequestError: there is one, and the recipe cannot replay it.
        """
        stage = self._stage()
        if stage is None:
            return self
        replay = self.levers.replay.inherited(
            stage, self.data.sources, anchored=self.levers.kl_anchor.anchored
        )
        canary = self.canary
        if not canary.sources and (sources := stage.canary()):
            canary = Canary.model_validate({**dict(canary), "sources": sources})
        margins = self._carried(stage)
        if replay is self.levers.replay and canary is self.canary and not margins:
            return self
        gate = {**dict(self.gate), "margins": {**self.gate.margins, **margins}}
        levers = self.levers.model_copy(update={"replay": replay})
        came = [f"the mixer '{replay.mixer}'"] * (replay.mixer != self.levers.replay.mixer)
        came += ["lessons that it was taught"] * (replay.earlier != self.levers.replay.earlier)
        try:
            return type(self).model_validate(
                {**dict(self), "levers": levers, "canary": canary, "gate": gate}
            )
        except ValidationError as error:
            raise RequestError(
                *(
                    f"model.path: '{self.model.path}' came with {' and '.join(came)}, but {line}; "
                    "or set levers.replay: none"
                    for line in explain(error, type(self))
                )
            ) from error

    def _carried(self, stage: Stage) -> dict[str, str]:
        """What the run before allowed its probes to lose, where this recipe does not say."""
        from holdfast.gate.beforehand import capabilities, carried

        margins = stage.recipe().get("gate", {}).get("margins", {})
        if not margins:
            return {}
        try:
            before = Gate(margins=margins)
        except ValidationError as error:
            raise RequestError(
                *(
                    f"model.path: the recipe.yaml of '{self.model.path}': gate.{line}"
                    for line in explain(error, Gate)
                )
            ) from error
        return carried(before, self.gate, capabilities(self.items()[1], {}))


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def load_recipe(path: str | Path | None = None, words: Iterable[str] = (), **fields: Any) -> Recipe:
    """One Recipe from a YAML file, `key=value` words over it, and keyword arguments over both.

    Raises:
        RequestError: every problem, one line each.
    """
    settings: dict[str, Any] = {} if path is None else read_yaml(Path(path))
    problems: list[str] = []
    given: list[str] = []
    for word in words:
        try:
            key, value = _read_word(word)
            _assign(settings, key.split("."), value, word)
        except RequestError as error:
            problems += error.problems
        else:
            given.append(key)
    for key, value in fields.items():
        if value is not None:
            _assign(settings, [key], value, key)
            given.append(key)
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems += explain(error, Recipe, where=str(path) if path else "", elsewhere=given)
    if problems:
        raise RequestError(*problems)
    return recipe.with_stage()


def _read_word(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RequestError(f"'{word}': give settings as key=value, such as train.epochs=2")
    try:
        return key, yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        raise RequestError(
            f"'{word}': the value is not YAML ({_yaml_problem(error)}); give a value such as 2, "
            "name or [a, b]"
        ) from error


SHORTHANDS = {"model": "path", "data": "sources"}
"""Sections that may be given as a plain value, and the field which that value is."""


def _assign(settings: dict[str, Any], keys: list[str], value: Any, word: str) -> None:
    """Set one field, keeping what else its section holds."""
    if keys[0] in SHORTHANDS and len(keys) == 1 and isinstance(settings.get(keys[0]), Mapping):
        keys = keys if isinstance(value, Mapping) else [*keys, SHORTHANDS[keys[0]]]
    at = settings
    for depth, key in enumerate(keys[:-1]):
        at[key] = _opened(keys[: depth + 1], at.get(key, {}))
        if not isinstance(at[key], dict):
            raise RequestError(
                f"'{word}': {'.'.join(keys[: depth + 1])} is {shown(at[key])}, not a section; "
                "give it as a section, or leave it out"
            )
        at = at[key]
    at[keys[-1]] = _listed(value) if keys == ["data", "sources"] else value


def _opened(keys: list[str], value: Any) -> Any:
    """A section given in short (`model: PATH`, `levers: none`) as what it stands for."""
    if len(keys) == 1 and keys[0] in SHORTHANDS and isinstance(value, str | list):
        return {SHORTHANDS[keys[0]]: _listed(value) if keys[0] == "data" else value}
    if keys == ["levers"] and _is_off(value):
        return dict.fromkeys(levers(), "none")
    if keys[0] == "levers" and len(keys) == 2 and _is_off(value):
        return {}
    return value


class _Yaml(yaml.SafeLoader):
    """PyYAML's YAML 1.1, but `on`, `off`, `yes` and `no` are words, as they are in YAML 1.2.

    A key given twice is an error, not a silent choice of the last.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    letter: [(tag, words) for tag, words in known if not tag.endswith(":bool") or letter in "tTfF"]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dict. Raises RequestError with the line of a syntax error."""
    if path.is_dir():
        raise RequestError(f"recipe '{path}' is a folder; give the YAML file")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) if siblings else "`holdfast init` writes one"
        raise RequestError(f"recipe '{path}' does not exist; {hint}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: not YAML: {_yaml_problem(error)}; mend that line") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from error
    if settings is None:
        raise RequestError(f"{path}: empty; `holdfast init` writes a recipe to start from")
    if not isinstance(settings, dict):
        raise RequestError(f"{path}: a recipe is a mapping, such as 'model: PATH'")
    # a resolved recipe in a run folder carries what it was resolved with; that is not a setting
    if settings.pop("resolved", None) is not None:
        return at_home(settings, path.parent)
    return settings


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
