"""Files and directories are old or new and whole, whatever happens to their writers."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vocojax.errors import ConvertError
from vocojax.files import _swept, is_partial, new_directory, new_file, remove_abandoned, write_atomically, write_files

ROOT = Path(__file__).parent.parent
HEAD = """
import os, resource, sys
from pathlib import Path
from vocojax.files import new_directory, new_file, write_atomically
target = Path(sys.argv[1])
"""


def python(code: str, *arguments: object) -> subprocess.Popen:
    """Starts `HEAD` and the code in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", HEAD + code, *map(str, arguments)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.binary())
def test_content_is_kept_to_the_byte(tmp_path, content):
    write_atomically(tmp_path / "new" / "x", content)
    assert (tmp_path / "new" / "x").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"]


@pytest.mark.parametrize("code", [
    "with new_file(target / 'x') as partial:\n  partial.write_text('half')\n",
    "with new_directory(target / 'y') as partial:\n  (partial / 'x').write_text('half')\n",
])
def test_a_killed_writer_leaves_the_old_content_and_a_name_that_tells(tmp_path, code):
    (tmp_path / "x").write_text("old")
    process = python(code + "  print('half', flush=True)\n  sys.stdin.readline()\n  os._exit(0)", tmp_path)
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "x").read_text() == "old" and not (tmp_path / "y").exists()
    left, = (path.name for path in tmp_path.iterdir() if path.name != "x")
    assert is_partial(left) and not is_partial("x") and not is_partial(".x.partial")


@pytest.mark.parametrize("is_directory", [False, True])
def test_what_a_killed_writer_left_is_removed_by_the_next_and_nothing_else(tmp_path, is_directory):
    """That of a live writer stays, that of one on another machine for a day, and what others named stays for ever."""
    code = "c = new_directory(target / 'y'); (c.__enter__() / 'x').write_text('half')" if is_directory else (
        "f = new_file(target / 'y'); f.__enter__().write_text('half')")
    process = python(code + "\nprint('half', flush=True)\nsys.stdin.readline()", tmp_path)
    assert process.stdout.readline() == "half\n"
    left, = (path.name for path in tmp_path.iterdir())
    for name in (f".z.{'0' * 32}.partial", f".w.{'1' * 32}.partial", ".x.partial", "plain"):
        (tmp_path / name).write_text("other")
    os.utime(tmp_path / f".w.{'1' * 32}.partial", (1, 1))
    stays = {f".z.{'0' * 32}.partial", ".x.partial", "plain"}
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == stays | {left}
    if is_directory:
        with pytest.raises(ConvertError, match=rf"y: process {process.pid} on this machine writes it already; wait"), \
                new_directory(tmp_path / "y"):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    _swept.discard(tmp_path)
    with new_directory(tmp_path / "y") if is_directory else new_file(tmp_path / "y") as partial:
        (partial / "x" if is_directory else partial).write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == stays | {"y"}


def test_several_writers_at_once_never_show_a_part(tmp_path):
    code = "for _ in range(150): write_atomically(target, sys.argv[2] * 100_000)\n"
    processes = [python(code, tmp_path / "x", letter) for letter in "abc"]
    seen = set()
    while any(process.poll() is None for process in processes):
        if (tmp_path / "x").exists():
            content = (tmp_path / "x").read_text()
            assert len(content) == 100_000 and len(set(content)) == 1
            seen.add(content[0])
    assert [process.returncode for process in processes] == [0, 0, 0], [p.stderr.read() for p in processes]
    assert len(seen) > 1 and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("code", [
    "write_atomically(target / 'x', bytes(2**20))",
    "with new_file(target / 'x') as partial: partial.write_bytes(bytes(2**20))",
    "with new_directory(target / 'y') as partial: (partial / 'x').write_bytes(bytes(2**20))",
])
def test_a_full_disk_leaves_the_old_content_and_nothing_else(tmp_path, code):
    (tmp_path / "x").write_text("old")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
    process = python(limit + code, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1 and "OSError: [Errno 27] File too large" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_the_umask_alone_says_who_may_read(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "x", "text")
        with new_file(tmp_path / "y") as partial:
            partial.write_text("text")
        with new_directory(tmp_path / "z"):
            pass
        write_files(tmp_path / "w", lambda directory: (directory / "x").write_text("text"))
    finally:
        os.umask(before)
    mode = lambda name: (tmp_path / name).stat().st_mode & 0o777
    assert {mode("x"), mode("y"), mode("w/x")} == {0o666 & ~umask}
    assert {mode("z"), mode("w")} == {0o777 & ~umask}


def test_a_directory_appears_with_all_that_is_in_it_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), new_directory(tmp_path / "a" / "x") as partial:
        (partial / "part").write_text("half")
        raise KeyError
    assert list((tmp_path / "a").iterdir()) == []
    with new_directory(tmp_path / "a" / "x") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "part").write_text("whole")
        assert not (tmp_path / "a" / "x").exists()
    assert (tmp_path / "a" / "x" / "deep" / "part").read_text() == "whole"
    with pytest.raises(ConvertError, match=r"x: exists already; name a new directory or remove it"), \
            new_directory(tmp_path / "a" / "x"):
        pass


def test_files_are_added_to_a_directory(tmp_path):
    def write(directory: Path) -> None:
        (directory / "deep").mkdir()
        (directory / "deep" / "a").write_bytes(b"\x00\xff")
        (directory / "b").write_text("new")

    (tmp_path / "b").write_text("old")
    (tmp_path / "c").write_text("other")
    write_files(tmp_path, write)
    assert (tmp_path / "deep" / "a").read_bytes() == b"\x00\xff" and (tmp_path / "b").read_text() == "new"
    assert (tmp_path / "c").read_text() == "other"


@pytest.mark.parametrize("new", [new_file, new_directory])
def test_an_error_names_the_target_and_not_the_partial_file(new, tmp_path):
    with pytest.raises(OSError, match="Read-only file system") as error, new(tmp_path / "x") as partial:
        raise OSError(errno.EROFS, "Read-only file system", str(partial))
    assert error.value.filename == str(tmp_path / "x")
