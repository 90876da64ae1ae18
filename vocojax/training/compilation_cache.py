"""Compiled programs on disk, so that a run that is started again does not compile them again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from vocojax.files import is_remote
from vocojax.runs.directory import CheckpointError, run_path

LOG = logging.getLogger(__name__)
# XLA's own caches for GPUs, which JAX puts in the same directory; XLA can write to local paths only.
_XLAS_OWN = "jax_persistent_cache_enable_xla_caches"


@contextmanager
def programs_kept_in(directory: str, workdir: str | Path) -> Iterator[None]:
    """Lets JAX keep compiled programs in a directory while this context lasts.

    Where JAX has such a directory already (JAX_COMPILATION_CACHE_DIR), that one is used. If the directory can't be
    written, programs are compiled at every start, and the log says so.

    Args:
      directory: local or remote; a relative path is below `workdir`; '' is none.
      workdir: the run's directory.
    """
    has_one = jax.config.values["jax_compilation_cache_dir"] is not None
    path = _made(directory, workdir) if directory and not has_one else None
    if path is None:
        yield
        return
    xlas_own = jax.config.values[_XLAS_OWN]
    _use(path, "" if is_remote(path) else xlas_own)
    try:
        yield
    finally:
        _use(None, xlas_own)


def _made(directory: str, workdir: str | Path) -> str | None:
    is_whole = "://" in directory or Path(directory).is_absolute()
    try:
        path = run_path(directory) if is_whole else run_path(workdir) / directory
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, CheckpointError) as error:
        LOG.warning("run.compilation_cache: %s can't be written (%s): programs are compiled at every start", directory,
                    error)
        return None
    return str(path)


def _use(path: str | None, xlas_own: str) -> None:
    """Changes JAX's settings, which it otherwise reads once, before it first compiles."""
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update(_XLAS_OWN, xlas_own)
    compilation_cache.reset_cache()
