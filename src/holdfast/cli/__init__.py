"""The command line: one command for each thing the README promises.

    commands.py    the commands and their options, nothing else
    preflight.py   everything that can be checked before torch is imported
    starter.py     the recipe that `holdfast init` writes, generated from the schema
    batches.py     what `holdfast show-batch` shows
    check.py       what `holdfast check-data` finds
    evaluate.py    `holdfast eval`, `holdfast compare`: checkpoints that other tools made
    gate.py        `holdfast gate`: may a model be released; for CI systems
    rewind.py      `holdfast rewind`: back towards the base
    watch.py       `holdfast watch`: a run as its folder shows it, live
    options.py     what several of them share
    sweep.py       `holdfast sweep`: a search over settings
    theory.py      what `holdfast theory` shows
    mixer.py       `holdfast mixer`: freeze and show the mix that a model replays
    probes.py      `holdfast probes`: freeze, check and show probe items

`main` turns whatever went wrong into lines and an exit code (docs/exit-codes.md). Importing this
package imports neither torch nor pydantic: `holdfast --help` must be instant.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Sequence

import typer

from holdfast.cli.commands import app
from holdfast.errors import HoldfastError

__all__ = ["app", "main"]

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
"""What the system says of a file that a user named and may not use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; only our own bugs leave as exceptions."""
    words = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        return int(app(words, prog_name="holdfast", standalone_mode=False) or 0)
    except HoldfastError as error:
        return _fail(str(error).splitlines(), error.exit_code, words)
    except typer.TyperException as error:
        return _fail([_usage(error)], error.exit_code, words)
    except OSError as error:
        if error.errno not in REFUSED or error.filename is None:
            raise
        why = (error.strerror or "cannot be used").lower()
        problem = f"'{error.filename}': {why}; mend that, or name another"
        return _fail([problem], 2, words)
    except (RuntimeError, MemoryError) as error:
        if "home directory" in str(error):  # pathlib's, of ~NAME
            problem = "a path begins with ~ and a name that is no user here; give it in full"
            return _fail([problem], 2, words)
        if not _out_of_memory(error):
            raise
        problem = "out of memory; lower train.micro_batch_tokens, such as to half of what it is"
        return _fail([problem], 1, words)


def _fail(problems: list[str], code: int, words: Sequence[str]) -> int:
    """Say what went wrong: lines on stderr, or an object on stdout where --json was asked for."""
    if "--json" in words:
        print(json.dumps({"error": problems}, ensure_ascii=False))
    else:
        for problem in problems:
            print(f"holdfast: {problem}", file=sys.stderr)
    return code


def _usage(error: typer.TyperException) -> str:
    """A usage error of typer's as one line that ends with where to look."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    message = message.replace(". Did you mean", "; did you mean")
    if message.endswith("?"):
        return message
    command = getattr(getattr(error, "ctx", None), "command_path", "holdfast")
    return f"{message}; see `{command} --help`"


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether the accelerator's or the machine's memory was too small, as torch words it."""
    name, text = type(error).__name__, str(error)
    return name in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter off the terminal, unless the user asked for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:  # it has read the variable already
        sys.modules["transformers"].logging.set_verbosity_error()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
