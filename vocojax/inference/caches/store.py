"""A directory of caches that many processes fill and read at once.

    ROOT/<fingerprint's digest>/<N>[-int8]/<first 2 digits of the visual's digest>/<visual's digest>.safetensors

An entry holds all units of one visual: an image, the tiles of one, or the frames of a video. It is named by what it
holds, so two writers of one entry write the same content, and the last one wins.
"""

import contextlib
import glob
import os
import re
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple, get_args

from etils import epath

from vocojax.config import require
from vocojax.errors import shown
from vocojax.files import NotAFile, is_remote, read_file
from vocojax.inference.caches.cache import CacheError, VocoCache
from vocojax.inference.caches.files import DamagedCache, Storage, from_bytes, not_written, to_bytes, write_cache
from vocojax.inference.caches.fingerprint import Fingerprint, is_digest

# The last four parts of an entry's path. Nothing else is ever removed.
_ENTRY = re.compile(r"[0-9a-f]{32}/\d+(-int8)?/[0-9a-f]{2}/[0-9a-f]{32}\.safetensors")


class MissingCache(CacheError):
    """The store holds no such cache."""


class _Entry(NamedTuple):
    last_used: float
    size: int
    path: epath.Path


class Store:
    """Caches by visual, model and number of VoCo tokens.

    Args:
      root: a local directory, or any path that `etils.epath` knows (`gs://bucket/caches`); made at the first write.
      storage: `exact`, or `int8` for half of bfloat16's bytes and a small loss. One store may hold both kinds.
      max_bytes: beyond this size the least recently used entries are removed. Every writer checks the size after
        writing a twentieth of it, so each of several writers may exceed it by that much. On an object store, whose
        times can't be set, an entry's last use is its writing, or its last reading by this process.

    Raises:
      CacheError: the root is empty.
      ConfigError: the storage or the size is none of these.
    """

    def __init__(self, root: epath.PathLike, storage: Storage = "exact", max_bytes: int | None = None):
        if not os.fspath(root):
            raise CacheError("a store's directory must be named, got ''")
        require(storage in get_args(Storage), "storage", f"must be one of {list(get_args(Storage))}", storage)
        is_size = max_bytes is None or (isinstance(max_bytes, int) and max_bytes >= 0)
        require(is_size, "max_bytes", "must be a whole number >= 0 or None", max_bytes)
        self.root, self.storage, self.max_bytes = epath.Path(root), storage, max_bytes
        self._used: dict[str, float] = {}  # on an object store
        self._room = 0  # bytes that may be written before the store's size is checked again

    def path(self, digest: str, fingerprint: Fingerprint, num_vocos: int) -> epath.Path:
        """Returns where the entry of a visual with this digest belongs.

        Raises:
          CacheError: it is no digest; as a path it could lead out of the store.
        """
        if not is_digest(digest):
            raise CacheError(f"an image's digest must be 32 hexadecimal digits, got {shown(digest)}: compress the "
                             "image itself")
        kind = f"{num_vocos}-int8" if self.storage == "int8" else str(num_vocos)
        return self.root / fingerprint.digest / kind / digest[:2] / f"{digest}.safetensors"

    def has(self, digest: str, fingerprint: Fingerprint, num_vocos: int) -> bool:
        """Returns whether there is an entry of exactly that many VoCo tokens; it is not read."""
        path = self.path(digest, fingerprint, num_vocos)
        return path.exists() if is_remote(path) else os.path.isfile(path)

    def get(self, digest: str, fingerprint: Fingerprint, num_vocos: int) -> VocoCache:
        """Returns the cache of one visual; an entry with more VoCo tokens is cut to `num_vocos`.

        Args:
          digest: of the visual; a single image's is `image_digest`.
          fingerprint: of the model.
          num_vocos: VoCo tokens per unit.

        Raises:
          MissingCache: there is no entry; the message says what there is.
          DamagedCache: it is not what was written. It is removed, so that compressing again repairs it.
        """
        for kept in self._at_least(num_vocos, fingerprint):
            path = self.path(digest, fingerprint, kept)
            try:
                cache = from_bytes(read_file(path), str(path))
                if (cache.digest, cache.fingerprint, cache.tokens_per_unit) != (digest, fingerprint, kept):
                    raise DamagedCache(f"{path}: holds another image's or model's cache than its name says")
            except FileNotFoundError:
                continue
            except (CacheError, NotAFile) as error:  # also of another format: by its name it should be an entry
                with contextlib.suppress(OSError):  # a store that may only be read keeps it
                    path.unlink(missing_ok=True)
                problem = f"{path}: {error.strerror}" if isinstance(error, NotAFile) else str(error)
                raise DamagedCache(problem) from error
            except OSError as error:
                raise CacheError(f"{path}: can't be read: {error.strerror or error}") from error
            self._touch(path)
            return cache if kept == num_vocos else cache.truncate(num_vocos)
        raise MissingCache(f"{self.root}: holds no {self.storage} cache of image {digest} with {num_vocos} or more "
                           f"VoCo tokens by model {fingerprint.digest}; {self._contents(fingerprint)}")

    def require_writable(self) -> None:
        """Finds out, before images are compressed, whether entries can be written; makes the directory.

        An object store is not asked: who may write there need not be allowed to remove what was written to try it.

        Raises:
          CacheError: they can't.
        """
        if is_remote(self.root):
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()
        except OSError as error:
            raise not_written(self.root, error) from error

    def put(self, cache: VocoCache) -> None:
        """Writes an entry for each unit of a cache: each is a visual of its own; see `put_visual`."""
        for unit in range(cache.num_units):
            self.put_visual(cache.take(slice(unit, unit + 1)))

    def put_visual(self, cache: VocoCache) -> None:
        """Writes one entry for all units of a cache, then removes what is beyond the size limit.

        Raises:
          CacheError: it holds whole units or lacks its model's fingerprint, or the entry can't be written.
        """
        if cache.first_position == 0:
            raise CacheError("a store holds VoCo tokens; save a cache of whole units to a file of its own")
        content = to_bytes(cache, self.storage)
        assert cache.fingerprint is not None  # to_bytes has refused it otherwise
        path = self.path(cache.digest, cache.fingerprint, cache.tokens_per_unit)
        write_cache(path, content)
        if is_remote(path):
            self._touch(path)
        self._room -= len(content)
        if self.max_bytes is not None and self._room < 0:
            self._evict(self.max_bytes)

    def size(self) -> int:
        """Returns the bytes of all entries."""
        return sum(entry.size for entry in self._entries())

    def _evict(self, max_bytes: int) -> None:
        entries = sorted(self._entries())
        size = sum(entry.size for entry in entries)
        goal = max_bytes if size <= max_bytes else max_bytes - max_bytes // 20  # room until the next check
        for entry in entries[:-1]:  # the newest stays, however large
            if size <= goal:
                break
            entry.path.unlink(missing_ok=True)  # another writer may have been faster
            size -= entry.size
        self._room = max(0, min(max_bytes // 20, max_bytes - size))

    def _entries(self) -> Iterator[_Entry]:
        for path in epath.Path(glob.escape(str(self.root))).glob("*/*/*/*.safetensors"):
            if not _ENTRY.fullmatch("/".join(path.parts[-4:])):
                continue
            try:
                if is_remote(path):
                    stat = path.stat()
                    yield _Entry(max(stat.mtime, self._used.get(str(path), 0)), stat.length, path)
                else:
                    local = os.stat(path)
                    yield _Entry(local.st_mtime_ns / 1e9, local.st_size, path)
            except FileNotFoundError:  # removed since it was listed
                continue

    def _touch(self, path: epath.Path) -> None:
        if is_remote(path):
            self._used[str(path)] = time.time()
            return
        with contextlib.suppress(OSError):  # a store that may only be read has no order of use
            os.utime(path)

    def _at_least(self, num_vocos: int, fingerprint: Fingerprint) -> Iterator[int]:
        """Yields numbers of VoCo tokens that an entry may have; the directory is listed only after the first."""
        yield num_vocos
        yield from (n for n in self._kept(fingerprint) if n > num_vocos)

    def _kept(self, fingerprint: Fingerprint) -> list[int]:
        """Returns numbers of VoCo tokens for which there may be entries of a model, in this storage."""
        suffix = "-int8" if self.storage == "int8" else ""
        try:
            names = [path.name for path in (self.root / fingerprint.digest).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name.removesuffix(suffix)) for name in names
                      if name.endswith(suffix) and name.removesuffix(suffix).isdecimal())

    def _contents(self, fingerprint: Fingerprint) -> str:
        """Says in errors what the store holds."""
        if kept := self._kept(fingerprint):
            return f"of this model it has entries with {', '.join(map(str, kept))} VoCo tokens"
        models = sorted(path.name for path in self.root.iterdir()) if self.root.exists() else []
        return f"it has entries of the models {', '.join(models)}" if models else "it is empty"
