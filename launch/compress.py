"""Compresses image files into a store of VoCo caches, once; launch/answer.py answers questions from it.

    python launch/compress.py --images='photos/**/*.jpg' --checkpoint=runs/voco --store=caches

Interrupt it and run it again: what is in the store is passed over. On several hosts the same command runs on each, with
the flags of launch/train.py where the cluster is not detected; every process takes its share of the files.
"""

import dataclasses
import json
import sys

import jax
from absl import app, flags

from vocojax.cli.terminal import refuse_empty, require_writable, show_own_messages
from vocojax.config import ConfigError
from vocojax.errors import ConvertError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import CacheError
from vocojax.inference.caches.store import Store
from vocojax.inference.collection import Outcome, compress_files, find_files, int8_loss
from vocojax.parallel import cluster, processes
from vocojax.parallel.mesh import parse_mesh

IMAGES = flags.DEFINE_multi_string("images", None, "Glob of image files; repeatable.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Weights in any layout, or a run of training.", required=True)
STORE = flags.DEFINE_string("store", None, "Directory of the store, local or gs://.", required=True)
STORAGE = flags.DEFINE_enum("storage", "exact", ["exact", "int8"], "int8 halves bfloat16's bytes; prints its loss.")
PROBE = flags.DEFINE_string("probe", "What is in the picture?", "The question that int8's loss is measured with.")
MAX_GIB = flags.DEFINE_float("max_gib", None, "Beyond it the least recently used entries go.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images that run at once.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 8, "Threads that read images.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the model; default: as stored.")
MESH = flags.DEFINE_string("mesh", None, "data,fsdp,tensor of this process's devices (-1 for the rest); default: one.")
JSON = flags.DEFINE_string("json", None, "Where to write the counts and the bad files.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where it is not detected.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, where not detected.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, where not detected.")
refuse_empty("images", "checkpoint", "store")
require_writable("json")

PATIENCE = 7 * 24 * 3600.0  # seconds that a process waits for slower ones: they need not finish together


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments (is the glob in quotes?): {' '.join(argv[1:4])} ...")
    show_own_messages()
    try:
        cluster.initialize(cluster.find_cluster(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value))
        paths = find_files(IMAGES.value, jax.process_index(), jax.process_count())
        assistant = Assistant.from_pretrained(CHECKPOINT.value, mesh=parse_mesh(MESH.value), dtype=DTYPE.value)
        max_bytes = None if MAX_GIB.value is None else int(MAX_GIB.value * 2**30)
        store = Store(STORE.value, STORAGE.value, max_bytes)
        outcome = compress_files(assistant, store, paths, BATCH_SIZE.value, THREADS.value)
        good = [path for path in paths if path not in outcome.bad][: BATCH_SIZE.value]
        if STORAGE.value == "int8" and good:
            print(int8_loss(assistant, assistant.compress(good, BATCH_SIZE.value), PROBE.value))
        outcomes = processes.to_first("outcome", dataclasses.asdict(outcome), PATIENCE)
        processes.from_first("all are done", None, PATIENCE)
    except (ConvertError, ConfigError, CacheError, cluster.ClusterError, processes.MissingProcesses, OSError,
            ValueError) as error:
        sys.exit(f"error: {error}")
    if outcomes is None:
        return
    outcome = sum((Outcome(**one) for one in outcomes), Outcome())
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(outcome), file, indent=2)
    print(f"{STORE.value}: {outcome}")
    if outcome.bad and not outcome.compressed + outcome.skipped:
        sys.exit("error: none of the files is an image that can be used")


if __name__ == "__main__":
    app.run(main)
