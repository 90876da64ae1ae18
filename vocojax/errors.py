"""The base of all errors that a user can mend, and those that several rooms raise."""


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
