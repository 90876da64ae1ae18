"""The base of all errors that a user can mend, and those that several rooms raise."""


class VocojaxError(Exception):
    """Something that the user can mend: one line that names the thing, the place and the remedy."""


class ConvertError(VocojaxError, ValueError):
    """Weights that can't be read or written: one line that names the file, the tensor and what to do."""
