"""Directories on the Hugging Face hub: `hf://org/name[@revision]` wherever a directory is asked for.

Files lie in the hub's own cache (`HF_HOME`); a second use downloads nothing, and with `HF_HUB_OFFLINE=1` nothing is
asked for. Private repositories need `HF_TOKEN` or `hf auth login`.
"""

import fnmatch
import functools
import os
import re
from pathlib import Path
from typing import TypeVar

from vocojax.errors import InputError

SCHEME = "hf://"
_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<inside>(?!.*\.\.)[^\s]+?))?/?")
# Weights of other frameworks, and the same weights again in the form of LLaMA's and Mistral's own code: never read.
_OTHER = ["*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.ot", "*.mlmodel", "original/*",
          "consolidated*"]
P = TypeVar("P", bound=str | os.PathLike[str])


def local_copy(path: P) -> P | str:
    """Returns the local path of a directory or file on the hub, which is downloaded if need be; others as they are.

    Args:
      path: `hf://org/name`, `hf://org/name@revision`, or either followed by `/file/or/directory`. A slash within a
        revision is written `%2F`.

    Raises:
      InputError: there is no such repository, revision or file, or it can't be reached.
    """
    name = str(path)
    return _downloaded(name) if name.startswith(SCHEME) else path


def repository(path: str) -> tuple[str, str | None]:
    """Returns `org/name` and the revision of a repository's name on the hub, `hf://org/name[@revision]`.

    Raises:
      InputError: it is no name of a repository.
    """
    parts = _NAME.fullmatch(path)
    if parts is None or parts["inside"]:
        raise InputError(f"{path!r} is no repository on the hub; write hf://org/name or hf://org/name@revision")
    return parts["repo"], parts["revision"] and parts["revision"].replace("%2F", "/")


def cached_copy(repo: str, revision: str | None = None) -> str | None:
    """Returns the local path of a repository `org/name` if the hub's cache has it; nothing is downloaded."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(repo, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # not there, or no name of a repository
        return None


@functools.cache
def _downloaded(name: str) -> str:
    """Downloads once per process, so that all parts of one run are of one revision."""
    # Imported here: it takes as long as all of this package, and few commands name the hub.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    parts = _NAME.fullmatch(name)
    if parts is None:
        raise InputError(f"{name!r} is no name on the hub; write hf://org/name or hf://org/name@revision")
    repo, revision = parts["repo"], (parts["revision"] or "main").replace("%2F", "/")
    try:
        inside = f"{parts['inside']}/"
        skipped = [pattern for pattern in _OTHER if not fnmatch.fnmatch(inside, pattern)]  # what is named is wanted
        try:
            files = HfApi().list_repo_files(repo, revision=revision)
            if any(file.endswith(".safetensors") for file in files):
                skipped.append("pytorch_model*.bin")  # the same weights again
        except (OfflineModeIsEnabled, OSError) as error:
            if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
                raise
        directory = Path(snapshot_download(repo, revision=revision, ignore_patterns=skipped))
    except GatedRepoError:
        raise InputError(f"{name}: access must be granted; ask for it on https://huggingface.co/{repo} and set "
                         "HF_TOKEN") from None
    except RevisionNotFoundError:
        raise InputError(f"{name}: the repository has no revision {revision!r}; check the name after '@'") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: no such repository; check the name, or set HF_TOKEN if it is private") from None
    except HFValidationError as error:
        raise InputError(f"{name}: is no name on the hub: {str(error).splitlines()[0]}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise InputError(f"{name}: is not in the hub's cache, and the hub can't be reached; check the network, unset "
                         "HF_HUB_OFFLINE, or name a local directory") from None
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name}: can't be downloaded: {reason}; check the network and the disk") from None
    found = directory / (parts["inside"] or "")
    if not found.exists():
        raise InputError(f"{name}: the repository has no {parts['inside']}; check the name after the repository's")
    return str(found)
