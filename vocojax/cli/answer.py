"""Answers questions about images and videos from a store of VoCo caches.

    vocojax answer --checkpoint=runs/voco --store=caches --image=a.jpg --question='What is in the picture?'
    vocojax answer --checkpoint=runs/voco --store=caches --video=a.mp4 --frames=64 --question='What happens?'
    vocojax answer --checkpoint=runs/voco --store=caches --questions=questions.jsonl > answers.jsonl

A video is a file, or a directory of images that are its frames, in the order of their names. An image or a frame that
is not in the store is compressed and added. A line of the last form is {"image": PATH or [PATHS], "question": TEXT}, or
"video" for "image"; with both, the images come first. Further keys are kept, and "seed" is the question's seed. Answers
come in the order of the questions. The answer to a single question is printed while it is generated. A model that was
not trained with the VoCo mask (an upper bound, a baseline, plain LLaVA) reads whole images: --store does nothing there.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import app, flags

from vocojax.cli.flag_checks import refuse_arguments, refuse_empty
from vocojax.cli.program_cache import keep_programs
from vocojax.errors import InputError
from vocojax.files import json_line

if TYPE_CHECKING:
    from vocojax.inference.assistant import Assistant

FLAGS = flags.FLAGS
SHOWN = 10  # unknown words that are named


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, "Weights in any layout, or a run of training.", required=True)
    flags.DEFINE_string("store", None, "Directory for caches of images, local or gs://, to use them again; "
                        "default: none is kept.")
    flags.DEFINE_enum("storage", "exact", ["exact", "int8"], "Kind of entry to read and write.")
    flags.DEFINE_multi_string("image", [], "Image of the question; repeat it for several, in their order.")
    flags.DEFINE_multi_string("video", [], "Video of the question, a file or a directory of "
                              "frames, after its images; repeat it for several.")
    flags.DEFINE_integer("frames", 8, "The most frames of a video that are read.", lower_bound=1)
    flags.DEFINE_enum("frame_sampling", "uniform", ["uniform", "segments", "fps"], "Which frames of a video.")
    flags.DEFINE_string("question", None, "The question.")
    flags.DEFINE_string("questions", None, "File of questions, JSON lines; JSON lines with answers are printed.")
    flags.DEFINE_integer("batch_size", 32, "Questions that are answered at once.", lower_bound=1)
    flags.DEFINE_integer("vocos", None, "Number of each image's VoCo tokens to read; default: all.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Longest answer, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
    flags.DEFINE_integer("top_k", 0, "Draw from this many likeliest tokens; 0 for all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of tokens with this probability.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Divides the logits of tokens that are there already.")
    flags.DEFINE_multi_string("stop", [], "Text that ends an answer; repeatable.")
    flags.DEFINE_integer("seed", 0, "Seed of the question; with --questions, of the first one: later ones count on.",
                         lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Dtype of the model; default: as stored.")
    flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR over this process's devices (-1 for the rest); default: one.")
    refuse_empty("checkpoint", "store", "image", "video", "question", "questions")


def main(arguments: Sequence[str]) -> None:
    """Answers."""
    refuse_arguments(arguments)
    given = [bool(value) for value in (FLAGS.image or FLAGS.video, FLAGS.question, FLAGS.questions)]
    if given not in ([True, True, False], [False, False, True]):
        raise app.UsageError("give --image and --question, or --video and --question, or --questions=FILE.jsonl "
                             "without them")
    from vocojax.inference.assistant import Assistant
    from vocojax.inference.caches.cache import VocoCache
    from vocojax.inference.caches.store import Store
    from vocojax.inference.decoding.sampling import SamplingConfig
    from vocojax.inference.many import answer_all, answer_many, read_questions
    from vocojax.inference.requests import Request
    from vocojax.inference.video import compress_video
    from vocojax.inference.visuals import Video
    from vocojax.parallel.mesh import parse_mesh

    keep_programs()
    sampling = SamplingConfig(FLAGS.max_new_tokens, FLAGS.temperature, FLAGS.top_k, FLAGS.top_p,
                              FLAGS.repetition_penalty, tuple(FLAGS.stop))
    questions = read_questions(FLAGS.questions, FLAGS.seed) if FLAGS.questions else []
    assistant = Assistant.from_pretrained(FLAGS.checkpoint, mesh=parse_mesh(FLAGS.mesh), dtype=FLAGS.dtype)
    _warn_of_unknown_words(assistant, [FLAGS.question] if FLAGS.question else [each.text for each in questions])
    store = Store(FLAGS.store, FLAGS.storage) if FLAGS.store else None
    if questions:
        for question, answer in answer_all(assistant, store, questions, sampling, FLAGS.batch_size, FLAGS.vocos,
                                           FLAGS.frames, FLAGS.frame_sampling):
            print(json_line({**question.record, **answer}, sys.stdout.encoding), flush=True)
        return
    videos = [Video(path, FLAGS.frames, FLAGS.frame_sampling) for path in FLAGS.video]
    if not assistant.reads_caches:  # an upper bound or a baseline: the prompt holds the whole image
        sampling = dataclasses.replace(sampling, seed=FLAGS.seed)
        request = Request(FLAGS.question, (*FLAGS.image, *videos), sampling)
        (only,) = answer_many(assistant, [request], num_vocos=FLAGS.vocos, progress=None)
        if only.error:
            raise InputError(only.error)
        print(only.text)
        return
    caches = [assistant.recall(store, FLAGS.image) if store else assistant.compress(FLAGS.image)] if FLAGS.image else []
    cache = VocoCache.concat(caches + [compress_video(assistant, video, store) for video in videos])
    if FLAGS.vocos is not None:
        cache = cache.truncate(FLAGS.vocos)
    for (piece,) in assistant.stream(cache, [FLAGS.question], None, sampling, [FLAGS.seed]):
        print(piece, end="", flush=True)
    print()


def _warn_of_unknown_words(assistant: "Assistant", questions: Sequence[str]) -> None:
    """Warns of words in the questions that the model can't read."""
    words = list(dict.fromkeys(word for text in questions for word in assistant.tokenizer.unknown_words(text)))
    if words:
        logging.getLogger("vocojax").warning(
            "the model's tokenizer does not know these words of the question%s, and reads each as %s: %s%s",
            "s" * (len(questions) > 1), assistant.tokenizer.huggingface.unk_token, ", ".join(words[:SHOWN]),
            ", ..." * (len(words) > SHOWN))
