"""Compiled programs in the user's cache directory, so that a command compiles them once on a machine."""

import logging
import os
import platform
from pathlib import Path

LOG = logging.getLogger(__name__)
LEAST_SECONDS = 0.1  # of compilation for which a program is kept


def keep_programs() -> None:
    """Lets JAX keep compiled programs for the next start of a command.

    They are kept apart by host, because machines that share a home directory may have different CPUs. Where JAX has a
    directory already (JAX_COMPILATION_CACHE_DIR), that one is used. If the directory can't be made, programs are
    compiled at every start, and the log says so.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    path = directory()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        LOG.warning("%s can't be made (%s): programs are compiled at every start; set JAX_COMPILATION_CACHE_DIR", path,
                    error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def directory() -> Path:
    """Returns the directory in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "vocojax" / "programs" / (platform.node() or "host")
