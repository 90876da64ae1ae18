"""The base of all errors that a user can mend, and those that several rooms raise."""

import errno

_LONGEST = 200  # characters of a value that a message repeats
_REMEDIES = {
    errno.ENOSPC: "free some there, or name another place",
    errno.EDQUOT: "free some there, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name a place that this user may use",
    errno.EPERM: "name a place that this user may use",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another place, or remove what is there",
}


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, cut to 300 characters."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else ""


def os_problem(error: OSError) -> str:
    """Returns a failed system call as place, problem and remedy; only the message if it names no place."""
    if not error.filename or not error.strerror:
        return str(error)
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{error.filename}: {error.strerror}{f'; {remedy}' if remedy else ''}"


def shown(value: object) -> str:
    """Returns a value's `repr` for a message; the middle of a long one, such as a whole question, is left out."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 4 :]}"


class VocojaxError(Exception):
    """A problem that the user can mend; its one line names the thing, the place and the remedy."""


class InputError(VocojaxError, ValueError):
    """An argument, a question or a file that can't be used as it is."""


class MissingPackage(VocojaxError, ImportError):
    """An optional package that is not installed; the message says how to install it."""


class ConvertError(VocojaxError, ValueError):
    """Weights that can't be read or written; the message names the file, the tensor and the remedy."""


class CheckpointError(VocojaxError, RuntimeError):
    """A run's directory that is missing, damaged or of another config."""
