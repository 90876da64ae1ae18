"""Compresses image and video files into a store of VoCo caches, for `vocojax answer`.

    vocojax compress --images='photos/**/*.jpg' --checkpoint=runs/voco --store=caches
    vocojax compress --videos='clips/*.mp4' --frames=64 --frame_sampling=fps --checkpoint=runs/voco --store=caches
    vocojax compress --videos='frames/*' --frames=64 --checkpoint=runs/voco --store=caches

The last form takes directories of images. Each is one video, its frames in the order of their names. Run the same
command after an interruption: what is in the store is skipped. `vocojax answer` finds a video's frames if it is given
the same --frames and --frame_sampling. On several hosts the same command runs on each, with the flags of
`vocojax train` where the cluster is not detected; every process takes its share of the files.
"""

import dataclasses
import json
from collections.abc import Sequence

from absl import app, flags

from vocojax.cli.flag_checks import refuse_arguments, refuse_empty, require_writable
from vocojax.cli.program_cache import keep_programs
from vocojax.errors import InputError

FLAGS = flags.FLAGS
PATIENCE = 7 * 24 * 3600.0  # seconds that a process waits for slower ones: they need not finish together


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_multi_string("images", [], "Glob of image files; repeatable.")
    flags.DEFINE_multi_string("videos", [], "Glob of video files or of directories of frames; repeatable.")
    flags.DEFINE_integer("frames", 8, "The most frames of a video that are read.", lower_bound=1)
    flags.DEFINE_enum("frame_sampling", "uniform", ["uniform", "segments", "fps"], "Which frames of a video.")
    flags.DEFINE_string("checkpoint", None, "Weights in any layout, or a run of training.", required=True)
    flags.DEFINE_string("store", None, "Directory of the store, local or gs://.", required=True)
    flags.DEFINE_enum("storage", "exact", ["exact", "int8"],
                      "Kind of entry; int8 takes half of bfloat16's bytes, and its loss is printed.")
    flags.DEFINE_string("probe", "What is in the picture?", "Question that the loss of int8 is measured with.")
    flags.DEFINE_float("max_gib", None, "Size above which the least recently used entries are removed.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 64, "Images or frames that run at once.", lower_bound=1)
    flags.DEFINE_integer("threads", 8, "Threads that read images.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the model; default: as stored.")
    flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR over this process's devices (-1 for the rest); default: one.")
    flags.DEFINE_string("json", None, "File to write the counts and the bad files to.")
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where it is not detected.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, where it is not detected.")
    flags.DEFINE_integer("process_id", None, "Number of this process, where it is not detected.")
    refuse_empty("images", "videos", "checkpoint", "store")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Compresses."""
    refuse_arguments(arguments, " (is the glob in quotes?)")
    if not FLAGS.images and not FLAGS.videos:
        raise app.UsageError("give --images=GLOB, --videos=GLOB or both")
    import jax

    from vocojax.inference.assistant import Assistant
    from vocojax.inference.caches.store import Store
    from vocojax.inference.collection import (
        Outcome,
        compress_files,
        compress_videos,
        find_files,
        find_videos,
        int8_loss,
    )
    from vocojax.parallel import cluster, processes
    from vocojax.parallel.mesh import parse_mesh

    keep_programs()
    cluster.initialize(cluster.find_cluster(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id))
    share = (jax.process_index(), jax.process_count())
    paths = find_files(FLAGS.images, *share) if FLAGS.images else []
    videos = find_videos(FLAGS.videos, *share) if FLAGS.videos else []
    store = Store(FLAGS.store, FLAGS.storage, None if FLAGS.max_gib is None else int(FLAGS.max_gib * 2**30))
    store.require_writable()
    assistant = Assistant.from_pretrained(FLAGS.checkpoint, mesh=parse_mesh(FLAGS.mesh), dtype=FLAGS.dtype)
    if not assistant.reads_caches:
        raise InputError(f"{FLAGS.checkpoint}: was not trained with the VoCo mask, so it has no VoCo tokens to store; "
                         "answer its questions from whole images, or name another checkpoint")
    outcome = compress_files(assistant, store, paths, FLAGS.batch_size, FLAGS.threads) if FLAGS.images else Outcome()
    if FLAGS.videos:
        outcome += compress_videos(assistant, store, videos, FLAGS.frames, FLAGS.frame_sampling, FLAGS.batch_size)
    good = [path for path in paths if path not in outcome.bad][: FLAGS.batch_size]
    if FLAGS.storage == "int8" and good:
        print(int8_loss(assistant, assistant.compress(good, FLAGS.batch_size), FLAGS.probe))
    elif FLAGS.storage == "int8" and (good := [path for path in videos if path not in outcome.bad]):
        cache = assistant.compress_video(good[0], FLAGS.frames, FLAGS.frame_sampling, batch_size=FLAGS.batch_size)
        print(int8_loss(assistant, cache, FLAGS.probe))
    outcomes = processes.to_first("outcome", dataclasses.asdict(outcome), PATIENCE)
    processes.from_first("all are done", None, PATIENCE)
    if outcomes is None:
        return
    outcome = sum((Outcome(**one) for one in outcomes), Outcome())
    if FLAGS.json:
        with open(FLAGS.json, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(outcome), file, indent=2)
    print(f"{FLAGS.store}: {outcome}")
    if outcome.bad and not outcome.compressed + outcome.skipped:
        raise InputError("none of the files can be used: the lines above say why")
