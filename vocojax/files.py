"""Whole-or-absent writes of files and directories, local or remote (`gs://...`).

One guarantee for all of them: readers see what was there before or everything that is new, never a part, whoever else
writes at the same time and whenever the process is killed. On a local disk that is a unique name beside the target,
fsync and a rename; an object store shows an object only when all of it has arrived.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from vocojax.errors import ConvertError


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in an object store: whole files only, no appending, no renaming."""
    return "://" in os.fspath(path)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file so that readers see the old content or the new one, never a part.

    Args:
      path: the file; its directory is made if it is missing.
      content: text is written as UTF-8.

    Raises:
      OSError: the disk is full, or whatever else the system says; nothing is left behind.
    """
    content = content.encode() if isinstance(content, str) else content
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):
        target.write_bytes(content)
        return
    partial = Path(target.parent) / partial_name(target.name)
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(name: str) -> str:
    """Returns an unused name for a file or directory while it is being written."""
    return f".{name}.{uuid.uuid4().hex}.partial"


def write_directory(path: epath.Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a directory that may be remote."""
    if not is_remote(path):
        write(Path(path))
        return
    with tempfile.TemporaryDirectory() as local:
        write(Path(local))
        for file in Path(local).rglob("*"):
            if file.is_file():
                target = path / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a directory to fill that becomes `target` at the end of the `with` block, and vanishes if the block fails.

    Raises:
      ConvertError: `target` exists already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target}: exists already; name a new directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / partial_name(target.name)
    partial.mkdir()
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
