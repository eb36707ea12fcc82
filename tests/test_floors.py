"""The floors of the building: the contract in pyproject.toml, kept by import-linter."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_ERROR, EXIT_STATUS_SUCCESS, lint_imports

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_no_room_imports_from_a_floor_above(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(PYPROJECT), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_upside_down_the_floors_are_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (contract,) = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    turned = contract | {"layers": contract["layers"][::-1], "exhaustive": False}
    fields = "\n".join(f"{key} = {json.dumps(value)}" for key, value in turned.items())
    file = tmp_path / "turned.toml"
    file.write_text(
        '[tool.importlinter]\nroot_package = "holdfast"\n'
        f"[[tool.importlinter.contracts]]\n{fields}\n"
    )
    assert lint_imports(config_filename=str(file), no_cache=True) == EXIT_STATUS_ERROR
    assert "holdfast.model -> holdfast.errors" in capsys.readouterr().out
