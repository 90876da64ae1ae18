"""Where commands keep compiled programs."""

import logging
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from vocojax.cli import program_cache

DIRECTORY, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
BYTES = "jax_compilation_cache_max_size"


@pytest.fixture
def settings():
    """JAX's settings as at a start without a directory; the tests' own are put back."""
    before = {name: jax.config.values[name] for name in (DIRECTORY, SECONDS, BYTES)}
    jax.config.update(DIRECTORY, None)
    yield lambda name: jax.config.values[name]
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_in_the_users_cache_directory_by_host(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache.platform, "node", lambda: "box")
    program_cache.keep_programs()
    assert settings(DIRECTORY) == str(tmp_path / "vocojax" / "programs" / "box") and settings(SECONDS) == 0.1
    assert (tmp_path / "vocojax" / "programs" / "box").is_dir()


def test_a_directory_that_jax_has_is_kept(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(DIRECTORY, "/elsewhere")
    program_cache.keep_programs()
    assert settings(DIRECTORY) == "/elsewhere" and not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_is_logged(settings, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        program_cache.keep_programs()
    assert "programs are compiled at every start; set JAX_COMPILATION_CACHE_DIR" in caplog.text
    assert settings(DIRECTORY) is None


def test_the_kept_programs_have_a_limit(settings, monkeypatch, tmp_path):
    """Those that were not used for longest go, among them those of earlier versions, without times of use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache, "LEAST_SECONDS", 0)
    path = program_cache.directory()
    path.mkdir(parents=True)
    for name, age in (("used", 2000), ("unused", 1000)):
        (path / f"{name}-cache").write_bytes(bytes(2**20))
        os.utime(path / f"{name}-cache", (age, age))
    monkeypatch.setattr(program_cache, "MOST_BYTES", 2 * 2**20)
    program_cache.keep_programs()
    compilation_cache.reset_cache()
    assert settings(BYTES) == 2 * 2**20
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0))
    names = {file.name for file in path.glob("*-cache")}
    assert "used-cache" in names and "unused-cache" not in names and len(names) >= 2
    assert not (path / "unused-atime").exists()


def test_another_limit_is_kept(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(BYTES, 10**6)
    program_cache.keep_programs()
    assert settings(BYTES) == 10**6
