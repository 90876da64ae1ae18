"""Writes of whole files and directories, local or remote (`gs://...`).

One guarantee for all of them: a reader sees the old content or all of the new content, never a part of it. This holds
with several writers at the same time, and when a writer is killed or the machine loses power. On a local disk the
content goes to an unused name next to the target, then to the disk (fsync), and is renamed. An object store shows an
object only after all of it has arrived.

A killed writer leaves a file or directory named `.NAME.HEX.partial` (`is_partial`), which nobody reads. The next
process that writes into the same directory removes it (`remove_abandoned`).
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath.gpath import PosixGPath

from vocojax.errors import ConvertError
from vocojax.liveness import ProcessName, this_process

_DEEPEST = 100  # levels of lists and objects in JSON
LOG = logging.getLogger(__name__)
# The digits name the writer: its machine, its process, and a number that nobody can guess.
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})(?P<pid>[0-9a-f]{8})(?P<started>[0-9a-f]{10})"
                      r"[0-9a-f]{6}\.partial")
_ABANDONED = 86400.0  # seconds without a write after which the writer on another machine must have been killed
_swept: set[Path] = set()  # directories from which this process has removed what killed writers left


class LiteralPath(PosixGPath):
    """A local path whose `glob` takes only its argument for a pattern.

    `epath` takes the directory for a part of the pattern: in `runs/[v2]` it finds nothing. Paths made from this one
    (`/`, `parent`, `iterdir`) are of the same kind, also inside Orbax.
    """

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        """Yields the files below this directory that match the pattern."""
        return (type(self)(path) for path in sorted(Path(self).glob(pattern)))


def parse_json(text: str | bytes) -> Any:
    """Parses JSON from a file that others may have written.

    Raises:
      ValueError: it is not JSON, not UTF-8, or lists and objects are nested more than 100 deep. (Python's own limit
        depends on the caller's depth, and whoever walks or writes the value again needs room too.)
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [value], 0
    while level := [outer for outer in level if isinstance(outer, dict | list)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return value


def json_line(value: Any, encoding: str | None = None) -> str:
    """Returns a value as one line of JSON that can be written in an encoding.

    Args:
      value: anything that JSON can hold.
      encoding: of what it is written to; None for UTF-8. Characters that it lacks, and lone surrogates, which no
        encoding has, make the whole line ASCII with JSON's escapes.
    """
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


class NotAFile(OSError):
    """A named pipe, a socket or a device in a file's place: reading it may never end."""


def read_file(path: epath.Path) -> bytes:
    """Reads a file, local or remote.

    Raises:
      NotAFile: something else is in its place.
      OSError: it can't be read.
    """
    if is_remote(path):
        return path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe is opened at once
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAFile(errno.EINVAL, "is no file but a pipe or a device", str(path))
        return file.read()


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in an object store: no appending and no renaming there."""
    return "://" in os.fspath(path)


def is_partial(name: str) -> bool:
    """Returns whether a file or directory of this name is being written, or was left by a killed writer."""
    return _PARTIAL.fullmatch(name) is not None


def remove_abandoned(directory: str | os.PathLike) -> None:
    """Removes from a local directory what killed writers left there; what can't be removed stays.

    A writer on this machine is seen to be dead. One on another machine counts as dead after a day without a write.
    """
    for path in Path(directory).iterdir():
        if (writer := _writer(path.name)) is None:
            continue
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            if writer.is_dead if writer.is_on_this_machine else time.time() - _last_write(path) > _ABANDONED:
                _remove(path)
                LOG.warning("removed %s, which a killed process left", path)


def _writer(name: str) -> ProcessName | None:
    """Returns the writer of a file or directory of this name; None if it is not being written."""
    parts = _PARTIAL.fullmatch(name)
    if parts is None:
        return None
    return ProcessName("", parts["machine"], int(parts["pid"], 16), int(parts["started"], 16))


def _last_write(path: Path) -> float:
    """Returns when a file, or anything in a directory, was last written, in seconds since 1970."""
    return max(file.lstat().st_mtime for file in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file, replacing the one that is there.

    Args:
      path: the file, local or remote; missing directories are made.
      content: text is written as UTF-8.

    Raises:
      OSError: for example, the disk is full; what was there stays, and nothing else is left.
    """
    content = content.encode() if isinstance(content, str) else content
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):
        target.write_bytes(content)
        return
    with new_file(target) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the name of a file to write, which becomes `path` at the end of the `with` block.

    For content too large for memory, or written by a library that wants a file's name; see `write_atomically` for all
    else. If the block fails, what was at `path` stays and the new file is removed.

    Args:
      path: a local file; its directory exists.

    Raises:
      OSError: for example, the disk is full.
    """
    target = Path(path)
    partial = _partial(target)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
    except OSError as error:
        _name_target(error, partial, target)
        raise
    finally:
        with contextlib.suppress(OSError):  # gone, or a directory that can't be reached, which has its own error
            partial.unlink()


def files_below(directory: str | os.PathLike) -> Iterator[str]:
    """Yields the paths, in a directory that may be remote, of all files in it and in the directories below it."""
    for path in sorted(epath.Path(directory).iterdir()):
        if path.is_dir():
            yield from (f"{path.name}/{name}" for name in files_below(path))
        else:
            yield path.name


@contextlib.contextmanager
def local_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a local directory with the files of one that may be remote; a copy goes at the end of the `with` block."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in files_below(path):
            target = Path(copy, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((epath.Path(path) / name).read_bytes())
        yield Path(copy)


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a directory to fill, which becomes `target` at the end of the `with` block.

    If the block fails, the directory is removed.

    Args:
      target: a local path; missing parent directories are made.

    Raises:
      ConvertError: `target` exists already and is no empty directory, or another process on this machine writes it.
      OSError: for example, the disk is full.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target}: exists already; name a new directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.iterdir():
        parts, writer = _PARTIAL.fullmatch(path.name), _writer(path.name)
        if writer and parts and parts["name"] == target.name and writer.is_on_this_machine and not writer.is_dead:
            raise ConvertError(f"{target}: process {writer.pid} on this machine writes it already; wait until it ends, "
                               "or name a new directory")
    partial = _partial(target)
    try:
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if not path.is_symlink():
                _sync(path)
        _sync(partial)
        partial.replace(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            _name_target(error, partial, target)
        raise


def write_files(directory: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Writes several files into a directory that may be remote and may hold others; each file appears whole.

    Args:
      directory: made if it is missing.
      write: called with an empty local directory, which it fills.
    """
    with tempfile.TemporaryDirectory() as local:
        write(Path(local))
        for file in sorted(Path(local).rglob("*")):
            if file.is_file():
                write_atomically(epath.Path(directory) / file.relative_to(local).as_posix(), file.read_bytes())


def _name_target(error: OSError, partial: Path, target: Path) -> None:
    """Makes an error about a partial file or directory one about its target, which is what a user knows."""
    if error.filename is not None and os.fspath(error.filename) == str(partial):
        error.filename = str(target)


def _partial(target: Path) -> Path:
    """Returns an unused name for what becomes `target`; first removes what killed writers left next to it."""
    if target.parent not in _swept:
        _swept.add(target.parent)
        remove_abandoned(target.parent)
    writer = this_process()
    digits = f"{writer.machine}{writer.pid:08x}{writer.started:010x}{secrets.token_hex(3)}"
    return target.parent / f".{target.name}.{digits}.partial"


def _sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
