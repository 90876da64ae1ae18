"""Compiled programs of a run on disk."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from vocojax.training.compilation_cache import programs_kept_in


def directory_in_use():
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.fixture
def no_cache():
    """JAX without the directory of all tests."""
    before = directory_in_use()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_programs_are_kept_below_the_work_directory_while_a_run_lasts(no_cache, tmp_path):
    for directory, path in (("compiled", tmp_path / "run" / "compiled"), (str(tmp_path / "all"), tmp_path / "all")):
        with programs_kept_in(directory, tmp_path / "run"):
            assert directory_in_use() == str(path) and path.is_dir()
        assert directory_in_use() is None


def test_a_remote_directory_holds_no_caches_of_xla(no_cache, tmp_path, monkeypatch):
    """XLA itself could not write them."""
    option = "jax_persistent_cache_enable_xla_caches"
    before = jax.config.values[option]
    assert before
    with programs_kept_in("compiled", tmp_path):
        assert jax.config.values[option] == before
    monkeypatch.setattr("vocojax.training.compilation_cache.is_remote", lambda path: True)
    with programs_kept_in("compiled", tmp_path):
        assert jax.config.values[option] == "" and directory_in_use()
    assert jax.config.values[option] == before


def test_none_is_made_where_none_is_asked_for_or_jax_has_one(tmp_path):
    before = directory_in_use()
    with programs_kept_in("compiled", tmp_path):
        assert directory_in_use() == before
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with programs_kept_in("", tmp_path):
            assert directory_in_use() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_said(no_cache, tmp_path, caplog):
    (tmp_path / "compiled").write_text("a file")
    with programs_kept_in("compiled", tmp_path):
        assert directory_in_use() is None
    assert "run.compilation_cache: compiled can't be written" in caplog.text


def test_a_second_start_takes_the_programs_of_the_first(no_cache, tmp_path):
    """They are on disk, and are read although JAX had compiled without a cache before."""
    jax.jit(lambda x: x - 1)(1.0)
    slow = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    try:
        for start in range(2):
            with programs_kept_in("compiled", tmp_path):
                jax.jit(lambda x: x * 3 + 1)(2.0)
            assert bool(hits) == (start == 1)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", slow)
    assert list((tmp_path / "compiled").iterdir())
