"""The store returns what was put in, whoever else writes, and whatever happens to the disk."""

import dataclasses
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tests.helpers.hammer import IMAGES, MODEL, entry, hammer
from vocojax.config import ConfigError
from vocojax.inference.caches import store as store_module
from vocojax.inference.caches.cache import CacheError, VocoCache
from vocojax.inference.caches.files import DamagedCache, load
from vocojax.inference.caches.fingerprint import Fingerprint, image_digest
from vocojax.inference.caches.store import MissingCache, Store

ROOT = Path(__file__).parent.parent.parent


class Bucket(MemoryFileSystem):
    """An object store in memory, in the place of Google's."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012 (the class of fsspec is made so)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path, monkeypatch):
    """An empty store's place."""
    if request.param == "local":
        return tmp_path / "store [of *tests*]"
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv("EPATH_USE_TF", "false")
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    return "gs://bucket/store"


def test_what_is_put_is_got(root):
    store = Store(root)
    both = VocoCache.concat([entry(IMAGES[0]), entry(IMAGES[1])])
    store.put(both)
    for image in IMAGES[:2]:
        assert store.has(image, MODEL, 2) and not store.has(image, MODEL, 1)
        found = store.get(image, MODEL, 2)
        assert np.array_equal(found.k_LUNGD, entry(image).k_LUNGD) and found.image_digests == (image,)
    assert np.array_equal(store.get(IMAGES[0], MODEL, 1).k_LUNGD, entry(IMAGES[0]).k_LUNGD[:, :, :1])
    assert 2 * 65536 <= store.size() < 2 * 65536 + 4096
    assert Store(root, "int8").has(IMAGES[0], MODEL, 2) is False


def test_what_is_missing_is_said(root):
    store, other = Store(root), Fingerprint("{}", "other")
    with pytest.raises(MissingCache, match="it is empty"):
        store.get(IMAGES[0], MODEL, 2)
    store.put(entry(IMAGES[0]))
    with pytest.raises(MissingCache, match=f"image {IMAGES[1]} with 2 .* of this model it has entries with 2 VoCo"):
        store.get(IMAGES[1], MODEL, 2)
    with pytest.raises(MissingCache, match=f"by model {other.digest}; it has entries of the models {MODEL.digest}"):
        store.get(IMAGES[0], other, 2)
    with pytest.raises(MissingCache):
        store.get(IMAGES[0], MODEL, 3)


def test_damage_is_refused_and_mended_by_compressing_again(root):
    store = Store(root)
    store.put(entry(IMAGES[0]))
    path = store.path(IMAGES[0], MODEL, 2)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:1000] + b"\0" + whole[1001:]):
        path.write_bytes(content)
        with pytest.raises(DamagedCache, match=re.escape(str(path))):
            store.get(IMAGES[0], MODEL, 2)
        assert not store.has(IMAGES[0], MODEL, 2)
        store.put(entry(IMAGES[0]))
        assert np.array_equal(store.get(IMAGES[0], MODEL, 2).v_LUNGD, entry(IMAGES[0]).v_LUNGD)
    wrong = store.path(IMAGES[1], MODEL, 2)
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_bytes(whole)
    with pytest.raises(DamagedCache, match="another image's or model's cache than its name says"):
        store.get(IMAGES[1], MODEL, 2)


def test_the_least_recently_used_goes_first(root):
    size = len(store_module.to_bytes(entry(IMAGES[0])))
    store = Store(root, max_bytes=3 * size + size // 2)
    for image in IMAGES[:3]:
        store.put(entry(image))
        time.sleep(0.02)
    store.get(IMAGES[0], MODEL, 2)
    time.sleep(0.02)
    store.put(entry(IMAGES[3]))
    assert [store.has(image, MODEL, 2) for image in IMAGES] == [True, False, True, True]
    tiny = Store(root, max_bytes=1)
    tiny.put(entry(IMAGES[1]))
    assert [tiny.has(image, MODEL, 2) for image in IMAGES] == [False, True, False, False]


def test_what_is_no_entry_is_neither_counted_nor_removed(root):
    """Other people's files under the root, such as a Hugging Face cache that lies there."""
    store = Store(root, max_bytes=1)
    model = MODEL.digest
    foreign = [store.root / name for name in (
        "models--x/snapshots/rev/model.safetensors", f"{model}/2/00/model.safetensors", f"{model}/2/weights/a.partial",
        f"{model}/two/00/{IMAGES[0]}.safetensors", f"models--x/2/00/{IMAGES[0]}.safetensors")]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    for image in IMAGES[:2]:
        store.put(entry(image))
        store._room = -1
    assert [store.has(image, MODEL, 2) for image in IMAGES[:2]] == [False, True]
    assert all(path.read_bytes() == b"weights" for path in foreign)
    assert 65536 <= store.size() < 65536 + 2048


def test_a_root_must_be_named():
    with pytest.raises(CacheError, match="a store's directory must be named, got ''"):
        Store("")


def test_a_full_store_is_looked_through_once_in_a_twentieth(tmp_path, monkeypatch):
    looks, entries = [], Store._entries
    monkeypatch.setattr(Store, "_entries", lambda self: looks.append(0) or entries(self))
    values = np.zeros((1, 1, 1, 1, 8), np.float32)
    small = lambda i: VocoCache(values, values, 6, (f"{i:032x}",), MODEL)
    size = len(store_module.to_bytes(small(0)))
    store = Store(tmp_path, max_bytes=100 * size)
    for i in range(100):
        store.put(small(i))
    looks.clear()
    for i in range(100, 160):
        store.put(small(i))
    assert len(looks) <= 60 / 5
    assert 90 * size <= store.size() <= 105 * size and store.has(f"{159:032x}", MODEL, 1)


def test_an_entry_is_found_without_listing_the_others(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(entry(IMAGES[0]))
    monkeypatch.setattr(Store, "_kept", lambda *_: pytest.fail("the store was listed"))
    store.get(IMAGES[0], MODEL, 2)


def test_damage_in_a_store_that_may_only_be_read_is_named(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.put(entry(IMAGES[0]))
    path = store.path(IMAGES[0], MODEL, 2)
    path.write_bytes(b"torn")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "unlink", refuse)
    with pytest.raises(DamagedCache, match="torn or damaged"):
        store.get(IMAGES[0], MODEL, 2)


def test_a_store_that_cannot_be_written_is_found_out_before_images_are_compressed(tmp_path, monkeypatch):
    Store(tmp_path / "new").require_writable()
    assert list((tmp_path / "new").iterdir()) == [], "nothing is left of the trial"
    (tmp_path / "photo.png").write_bytes(b"")
    for place in ("photo.png", "photo.png/caches"):
        with pytest.raises(CacheError, match=r"photo\.png.*: can't be written: .*: name a directory$"):
            Store(tmp_path / place).require_writable()

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(CacheError, match="can't be written: Read-only file system: name a store that can be written"):
        Store(tmp_path / "new").require_writable()


def test_half_written_files_of_killed_writers_are_swept_up(tmp_path):
    store = Store(tmp_path)
    path = Path(store.path(IMAGES[0], MODEL, 2))
    path.parent.mkdir(parents=True)
    old, young = (path.parent / f".{path.name}.{digit * 32}.partial" for digit in "ab")
    for partial in (old, young):
        partial.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.put(entry(IMAGES[0]))
    assert not old.exists() and young.exists()


def test_threads_that_write_read_and_evict_the_same_entries(tmp_path):
    size = len(store_module.to_bytes(entry(IMAGES[0])))
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda seed: hammer(str(tmp_path), seed, 1.0, 2 * size), range(8)))
    assert sum(c["put"] for c in counts) > 8 and sum(c["get"] for c in counts) > 8
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("max_entries", [0, 2])
def test_eight_processes_of_which_some_are_killed(tmp_path, max_entries):
    """No reader ever sees a wrong entry, and every entry that is left is whole."""
    size = len(store_module.to_bytes(entry(IMAGES[0]))) * max_entries
    start = lambda seed: subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.hammer", str(tmp_path), str(seed), "12", str(size)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    workers = [start(seed) for seed in range(8)]
    while not list(tmp_path.rglob("*.safetensors")):
        time.sleep(0.1)
    time.sleep(4)  # all are at it
    for worker in workers[:3]:
        worker.kill()
    for worker in workers[3:]:
        out, error = worker.communicate(timeout=200)
        assert worker.returncode == 0, error
        assert int(re.search(r"'put': (\d+)", out)[1]) > 0
    for worker in workers[:3]:
        worker.communicate()
    store = Store(tmp_path)
    left = [image for image in IMAGES if store.has(image, MODEL, 2)]
    assert left and (max_entries or len(left) == 4)
    for image in left:
        assert np.array_equal(store.get(image, MODEL, 2).k_LUNGD, entry(image).k_LUNGD)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    """A limit on the size of files stops the write in the middle, as a full disk does."""
    store = Store(tmp_path)
    store.put(entry(IMAGES[0]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        for image in IMAGES[:2]:
            with pytest.raises(CacheError, match=r"safetensors: can't be written: File too large"):
                store.put(entry(image))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert np.array_equal(store.get(IMAGES[0], MODEL, 2).k_LUNGD, entry(IMAGES[0]).k_LUNGD)
    assert not store.has(IMAGES[1], MODEL, 2) and not list(tmp_path.rglob("*.partial"))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="No space left on device: free space, or limit the store's size"):
        store.put(entry(IMAGES[1]))
    assert not store.has(IMAGES[1], MODEL, 2) and not list(tmp_path.rglob("*.partial"))


def test_whole_units_and_nameless_caches_do_not_go_into_a_store(tmp_path):
    cache = entry(image_digest(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(CacheError, match="a store holds VoCo tokens"):
        Store(tmp_path).put(VocoCache(cache.k_LUNGD, cache.v_LUNGD, 0, cache.image_digests, MODEL))
    with pytest.raises(CacheError, match="without its model's fingerprint"):
        Store(tmp_path).put(VocoCache(cache.k_LUNGD, cache.v_LUNGD, 6, cache.image_digests))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("digest", ["/tmp/x", "../../../../x", "a" * 31, "A" * 32, "a" * 32 + "\n", "", 3])
def test_only_a_digest_becomes_a_path(tmp_path, digest):
    store = Store(tmp_path / "store")
    cache = dataclasses.replace(entry(IMAGES[0]), image_digests=(digest,))
    for use in (lambda: store.put(cache), lambda: store.get(digest, MODEL, 2), lambda: store.has(digest, MODEL, 2)):
        with pytest.raises(CacheError, match="an image's digest must be 32 hexadecimal digits, got"):
            use()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("how", [{"storage": "int4"}, {"max_bytes": -1}, {"max_bytes": 1.5}])
def test_a_store_of_another_kind_is_refused(tmp_path, how):
    with pytest.raises(ConfigError, match=next(iter(how))):
        Store(tmp_path, **how)


def test_a_pipe_in_an_entrys_place_does_not_hang(tmp_path):
    store = Store(tmp_path)
    path = Path(store.path(IMAGES[0], MODEL, 2))
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert not store.has(IMAGES[0], MODEL, 2)
    with pytest.raises(CacheError, match=rf"^{path}: can't be read: is no file but a pipe or a device$"):
        load(path)
    with pytest.raises(DamagedCache, match=rf"^{path}: is no file but a pipe or a device$"):
        store.get(IMAGES[0], MODEL, 2)
    assert not path.exists()
    os.mkfifo(path)
    store.put(entry(IMAGES[0]))
    assert store.get(IMAGES[0], MODEL, 2).num_units == 1
