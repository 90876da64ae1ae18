"""SHA-256 sums of the files of a directory, in the form of the command `sha256sum` (`sha256sum -c SHA256SUMS`).

Exports and run directories have such a file, so that a changed bit in a config, a tokenizer or a shard is refused.
Directories of others may have one too, with files that are not read here, or not there. Only what is read is compared.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping

from etils import epath
from tqdm import tqdm

from vocojax.errors import ConvertError
from vocojax.files import write_atomically

FILE = "SHA256SUMS"
WEIGHTS = ".safetensors"  # of files that are large, and compared when a tensor of them is read
_READ = (".json", ".jinja", ".model", ".txt", ".py")  # of the other files that are compared; not README.md or .bin
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")  # `*`: read in binary mode, which is the same on Linux


class ChangedFile(ConvertError):
    """A file that is not what its sum says."""


def write_sums(directory: str | os.PathLike, names: Iterable[str]) -> None:
    """Writes the sums of some files of a directory.

    Args:
      directory: local or remote.
      names: paths of the files in it. A README.md is left out: it is for people, who edit it.
    """
    root = epath.Path(directory)
    lines = [f"{sha256_of(root / name)}  {name}\n" for name in sorted(names) if name != "README.md"]
    write_atomically(root / FILE, "".join(lines))


def read_sums(directory: str | os.PathLike) -> dict[str, str]:
    """Reads the sums of a directory by the files' paths in it; {} if it has none.

    Raises:
      ChangedFile: the file of sums is damaged.
    """
    path = epath.Path(directory) / FILE
    try:
        lines = [line for line in path.read_bytes().decode("utf-8-sig").splitlines() if line]
        return {name: digest.lower() for digest, name in (_LINE.fullmatch(line).groups() for line in lines)}  # type: ignore[union-attr]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, AttributeError):
        raise ChangedFile(f"{path}: is damaged; restore it, or remove it to use the directory unchecked") from None


def require_small_files(directory: str | os.PathLike) -> dict[str, str]:
    """Compares configs, tokenizers and sources of a directory with their sums, if it has any, and returns all sums.

    Raises:
      ChangedFile: see `require_unchanged`.
    """
    sums = read_sums(directory)
    require_unchanged(directory, {name: sums[name] for name in sums if name.endswith(_READ)})
    return sums


def require_unchanged(directory: str | os.PathLike, sums: Mapping[str, str]) -> None:
    """Compares files of a directory with their sums.

    Raises:
      ChangedFile: one is missing or was changed; the message names it.
    """
    for name, digest in sums.items():
        path = epath.Path(directory) / name
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            raise ChangedFile(f"{path}: is missing, but {FILE} lists it; restore it, or remove that line") from None
        if found != digest:
            raise ChangedFile(f"{path}: was changed after it was written ({FILE}); restore it or write the directory "
                              f"again, or remove its line from {FILE} if the change is meant")


def sha256_of(path: epath.Path) -> str:
    """Returns the SHA-256 of a file; a progress bar is shown if it takes long."""
    digest = hashlib.sha256()
    with path.open("rb") as file, tqdm(unit="B", unit_scale=True, delay=3, desc=f"checking {path.name}",
                                       leave=False) as bar:
        while part := file.read(2**22):
            digest.update(part)
            bar.update(len(part))
    return digest.hexdigest()
