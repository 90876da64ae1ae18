"""Compiled programs in the user's cache directory, so that a command compiles them once on a machine."""

import logging
import os
import platform
from pathlib import Path

LOG = logging.getLogger(__name__)
LEAST_SECONDS = 0.1  # of compilation for which a program is kept
MOST_BYTES = 4 * 2**30  # of all kept programs of a host
_MOST_BYTES = "jax_compilation_cache_max_size"


def keep_programs() -> None:
    """Lets JAX keep compiled programs for the next start of a command.

    They are kept apart by host, because machines that share a home directory may have different CPUs. When they have
    more than `MOST_BYTES`, JAX removes those that were not used for longest; JAX_COMPILATION_CACHE_MAX_SIZE sets
    another limit. Where JAX has a directory already (JAX_COMPILATION_CACHE_DIR), that one is used as JAX is set. If the
    directory can't be written, programs are compiled at every start, and the log says so.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    path = directory()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _give_times_of_use(path)
    except OSError as error:
        LOG.warning("%s can't be written (%s): programs are compiled at every start; set JAX_COMPILATION_CACHE_DIR",
                    path, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    if jax.config.values[_MOST_BYTES] == -1:  # no limit
        jax.config.update(_MOST_BYTES, MOST_BYTES)


def directory() -> Path:
    """Returns the directory in the user's cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "vocojax" / "programs" / (platform.node() or "host")


def _give_times_of_use(path: Path) -> None:
    """Writes the times of last use that JAX's limit needs, where they are missing: JAX would keep no more programs.

    They are missing after a start without a limit, and after a command that was killed while it wrote a program.
    """
    for program in path.glob("*-cache"):
        time_of_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
        if not time_of_use.exists():
            time_of_use.write_bytes(program.stat().st_mtime_ns.to_bytes(8, "little"))
