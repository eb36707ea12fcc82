"""Writing so that a file is whole or not there; one line that says so where it cannot be."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.errors import HoldfastError, RequestError


def write_text(path: Path, text: str) -> Path:
    """Write to a temporary name, then rename: the file is never half there. Returns `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_named(path):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def require_writable(path: Path) -> None:
    """Refuse a file or folder that could not be made, before the work for it is done.

    Raises:
        RequestError: it names the folder that may not be written.
    """
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if not os.access(folder, os.W_OK):
        raise RequestError(f"'{path}' cannot be made: '{folder}' may not be written; name another")


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn 'no space left' and 'not permitted' into one line that names the folder."""
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or _of_full_disk(error, path):
            raise RequestError(
                f"the disk is full while writing '{path}'; free some space, or give --out on "
                "another disk; the last complete checkpoint is kept, --resume continues from it"
            ) from error
        if not isinstance(error, OSError):
            raise
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise RequestError(
                f"'{path}' lies below a file; give a folder that does not exist yet"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RequestError(f"'{path}' cannot be written ({error.strerror})") from error
        raise HoldfastError(f"'{path}': {error.strerror or error}") from error


def _of_full_disk(error: Exception, path: Path) -> bool:
    """Whether this is how safetensors (in words) or torch.save (in none) meet a full disk."""
    if "No space left on device" in str(error):
        return True
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    return isinstance(error, RuntimeError) and not shutil.disk_usage(folder).free


def cache_folder() -> Path:
    """`$HOLDFAST_CACHE`, else holdfast's in the user's cache folder."""
    if given := os.environ.get("HOLDFAST_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "holdfast"
