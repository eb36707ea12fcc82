"""Where a stage's weights lie: a model, an adapter on a model, or the folder of a run.

Nothing here imports torch, and nothing is loaded: files are named, and what is missing or would
have to be unpickled is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from holdfast.errors import RequestError

PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
ARTIFACTS = ("model", "adapter")
"""What a run's own weights are named in its folder."""
EARLIER_PROBES = "earlier_probes.jsonl"
"""The probes of the stages before, as a run keeps them in its folder."""
MENDED = "give a folder written by save_pretrained"


@dataclass(frozen=True)
class Stage:
    """The files of one stage's weights."""

    model: str
    """Folder or hub id of whole weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapters: tuple[Path, ...] = ()
    """Folders of the adapters to merge into the model, in this order."""
    tokenizer: str | None = None
    """Folder or hub id; None where a local folder has none."""
    run: Path | None = None
    """The run folder that was named, if one was."""

    def parents(self) -> list[dict[str, Any]]:
        """The stages before a run that starts here, as the run folder recorded them; else none."""
        if self.run is None:
            return []
        resolved: dict[str, Any] = _recipe_of(self.run).get("resolved", {})
        return list(resolved.get("lineage", []))

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of the run that came to these weights; empty where none is known.

        A run is known by its folder, or by that of its `model/` or `adapter/`.
        """
        weights = [*reversed(self.adapters), Path(self.model)]
        folders = [self.run, *(one.parent for one in weights if one.name in ARTIFACTS)]
        recipes = (_recipe_of(folder) for folder in folders if folder is not None)
        return next((one for one in recipes if "resolved" in one), {})

    def taught(self) -> list[dict[str, Any]]:
        """Sources of what this stage and those before it learned, the last one's first; of a run.

        As the run's recipe has them.
        """
        recipe = self.recipe()
        before = recipe.get("levers", {}).get("replay", {}).get("earlier", {})
        return [*recipe.get("data", {}).get("sources", []), *before.get("sources", [])]

    def canary(self, there: bool = True) -> list[dict[str, Any]]:
        """Sources of the canary that a run was read by: those whose file is there, or is not."""
        sources: list[dict[str, Any]] = self.recipe().get("canary", {}).get("sources", [])
        return [one for one in sources if gone(one["path"]) is not there]


def locate(path: str, revision: str | None = None, *, field: str = "model.path") -> Stage:
    """The weights that `path` names.

    Args:
        path: a model folder, an adapter folder, a run folder or a hub id.
        revision: of a hub id.
        field: of the recipe, named where something is wrong.

    Raises:
        RequestError: every problem, one line each.
    """
    return _locate(path, revision, f"{field}: '{path}'", ())


def expanded(path: str) -> str:
    """A folder below ~ in full; a hub id, or what only looks like a home, as it is."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user
        return path


def looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant for a folder, not for a hub id."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def gone(path: str) -> bool:
    """Whether a path was meant for a file or folder, and there is none."""
    return looks_local(path) and not Path(path).expanduser().exists()


def tokenizer_in(folder: Path) -> str | None:
    """The folder, where it holds a tokenizer."""
    return str(folder) if any((folder / name).is_file() for name in TOKENIZERS) else None


def _locate(path: str, revision: str | None, named: str, above: tuple[Path, ...]) -> Stage:
    """`above` are the adapter folders through which this one was reached."""
    folder = Path(path).expanduser()
    if not folder.exists() and not looks_local(path):
        return Stage(path, revision, tokenizer=path)
    problems: list[str] = []
    if not folder.exists():
        problems.append(_missing(path, named))
    elif not folder.is_dir():
        problems.append(f"{named} is a file; give the folder that holds config.json")
    elif (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            return _adapter(folder, named, above)
        problems.append(
            f"{named} holds both a model (config.json) and an adapter (adapter_config.json); "
            "give each a folder of its own"
        )
    elif (folder / "config.json").is_file():
        problems += [*_config_problems(folder / "config.json"), *_weight_problems(folder, named)]
    elif "resolved" in _recipe_of(folder):
        return _run(folder, named, above)
    else:
        problems.append(f"{named} has no config.json; {MENDED}, or the folder of a finished run")
    if problems:
        raise RequestError(*problems)
    return Stage(expanded(path), tokenizer=tokenizer_in(folder))


def _run(folder: Path, named: str, above: tuple[Path, ...]) -> Stage:
    """What a run came to: its `model/`, or its `adapter/` on the base it was trained on."""
    if (folder / "model" / "config.json").is_file():
        found = _locate(str(folder / "model"), None, named, above)
    elif (folder / "adapter" / "adapter_config.json").is_file():
        found = _adapter(folder / "adapter", named, above)
        base = _recipe_of(folder).get("model", {})
        if found.revision is None and found.model == base.get("path"):
            found = replace(found, revision=base.get("revision"))
    else:
        raise RequestError(
            f"{named} is a run that has not ended (neither model/ nor adapter/ in it); finish it "
            f"with `holdfast train --resume --out {folder}`, or give another stage"
        )
    return replace(found, run=folder)


def _adapter(folder: Path, named: str, above: tuple[Path, ...]) -> Stage:
    """An adapter on its base: of a run the `base/` beside it, else what its config names."""
    config = _json(folder / "adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(_no_weights(folder, named, "adapter_model.safetensors"))
    if folder.resolve() in above:
        raise RequestError(f"{named} is an adapter whose base is itself; give its base's folder")
    own = folder.parent / "base"
    ours = folder.name == "adapter" and "resolved" in _recipe_of(folder.parent)
    kept = ours and (own / "config.json").is_file()
    base = str(own) if kept else config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RequestError(
            f"{named} is an adapter that names no base; set base_model_name_or_path in its "
            "adapter_config.json to the folder or hub id of the model it was trained on"
        )
    named = f"{named} is an adapter whose base '{base}'"
    found = _locate(base, config.get("revision"), named, (*above, folder.resolve()))
    return replace(
        found,
        adapters=(*found.adapters, folder),
        tokenizer=tokenizer_in(folder) or found.tokenizer,
        run=None,
    )


def _missing(path: str, named: str) -> str:
    folder = Path(path).expanduser()
    siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
    close = get_close_matches(folder.name, siblings, n=1)
    hint = f"did you mean '{folder.parent / close[0]}'?" if close else "give a folder"
    return (
        f"{named} does not exist; {hint} in transformers format (config.json, "
        "*.safetensors, tokenizer files) or a hub id with its owner, such as Qwen/Qwen3-0.6B"
    )


def _recipe_of(folder: Path) -> dict[str, Any]:
    """The resolved recipe of a run folder; empty where there is none."""
    try:
        found = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return at_home(found, folder) if isinstance(found, dict) else {}


def at_home(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe out of a run folder: its own probe file where the folder lies now, if it moved."""
    probes = recipe.get("probes")
    if not isinstance(probes, list):
        return recipe
    there = folder / EARLIER_PROBES
    moved = [
        str(there)
        if Path(str(path)).name == EARLIER_PROBES and not Path(str(path)).is_file()
        else path
        for path in probes
    ]
    return {**recipe, "probes": moved}


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where it is something else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not JSON ({error}); {MENDED}") from error
    return config if isinstance(config, dict) else {}


def _config_problems(file: Path) -> Iterator[str]:
    try:
        config = _json(file)
    except RequestError as error:
        yield from error.problems
        return
    if "model_type" not in config:
        yield f"{file}: field model_type is missing; {MENDED}, such as one with model_type llama"


def _weight_problems(folder: Path, named: str) -> Iterator[str]:
    if not any(folder.glob("*.safetensors")):
        yield _no_weights(folder, named, "*.safetensors")


def _no_weights(folder: Path, named: str, looked_for: str) -> str:
    pickles = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
    if pickles:
        return (
            f"{named.partition(':')[0]}: '{folder / pickles[0]}' is a pickle and is never loaded; "
            "convert it with save_pretrained(..., safe_serialization=True) and give that folder"
        )
    return f"{named} has no {looked_for} weights; {MENDED}"
