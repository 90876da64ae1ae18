"""Where commands keep compiled programs."""

import logging

import jax
import pytest

from vocojax.cli import program_cache

DIRECTORY, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def settings():
    """JAX's settings as at a start without a directory; the tests' own are put back."""
    before = {name: jax.config.values[name] for name in (DIRECTORY, SECONDS)}
    jax.config.update(DIRECTORY, None)
    yield lambda name: jax.config.values[name]
    for name, value in before.items():
        jax.config.update(name, value)


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
