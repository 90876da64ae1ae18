"""Answers questions about images from a store of VoCo caches; an image that is not in it is compressed and added.

    python launch/answer.py --checkpoint=runs/voco --store=caches --image=a.jpg --question='What is in the picture?'
    python launch/answer.py --checkpoint=runs/voco --store=caches --questions=questions.jsonl > answers.jsonl

A line of the second form is {"image": PATH or [PATHS], "question": TEXT}, further keys are kept; "seed" is its seed.
Answers come in the order of the questions. One question's answer is shown while it is being written.
"""

import json
import sys

from absl import app, flags

from vocojax.cli.terminal import refuse_empty, show_own_messages
from vocojax.config import ConfigError
from vocojax.errors import ConvertError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.store import Store
from vocojax.inference.decoding.sampling import SEEDS, SamplingConfig
from vocojax.inference.many import Question, answer_all, read_questions
from vocojax.parallel.mesh import parse_mesh

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Weights in any layout, or a run of training.", required=True)
STORE = flags.DEFINE_string("store", None, "Directory of the store, local or gs://.", required=True)
STORAGE = flags.DEFINE_enum("storage", "exact", ["exact", "int8"], "Which kind of entry to read and write.")
IMAGE = flags.DEFINE_multi_string("image", [], "Image of the question; several in their order.")
QUESTION = flags.DEFINE_string("question", None, "The question.")
QUESTIONS = flags.DEFINE_string("questions", None, "JSON lines of questions; prints JSON lines with answers.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Questions that are answered at once.", lower_bound=1)
VOCOS = flags.DEFINE_integer("vocos", None, "Read only so many of each image's VoCo tokens.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The longest answer.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many likeliest tokens; 0 for all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of tokens with this mass.")
PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "What logits of tokens that are there are divided by.")
STOP = flags.DEFINE_multi_string("stop", [], "Ends an answer; repeatable.")
SEED = flags.DEFINE_integer("seed", 0, "Of the question; those of --questions count on from it.",
                            lower_bound=0, upper_bound=SEEDS - 1)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the model; default: as stored.")
MESH = flags.DEFINE_string("mesh", None, "data,fsdp,tensor of this process's devices (-1 for the rest); default: one.")
refuse_empty("checkpoint", "store", "image", "question", "questions")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if [bool(flag.value) for flag in (IMAGE, QUESTION, QUESTIONS)] not in ([True, True, False], [False, False, True]):
        raise app.UsageError("give --image and --question, or --questions=FILE.jsonl without them")
    show_own_messages()
    try:
        sampling = SamplingConfig(MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, PENALTY.value,
                                  tuple(STOP.value))
        questions = (read_questions(QUESTIONS.value, SEED.value) if QUESTIONS.value
                     else [Question(tuple(IMAGE.value), QUESTION.value, SEED.value)])
        assistant = Assistant.from_pretrained(CHECKPOINT.value, mesh=parse_mesh(MESH.value), dtype=DTYPE.value)
        store = Store(STORE.value, STORAGE.value)
        if not QUESTIONS.value:
            cache = assistant.recall(store, IMAGE.value, VOCOS.value)
            for (piece,) in assistant.stream(cache, [QUESTION.value], None, sampling, [SEED.value]):
                print(piece, end="", flush=True)
            print()
            return
        for question, answer in answer_all(assistant, store, questions, sampling, BATCH_SIZE.value, VOCOS.value):
            print(json.dumps(question.record | answer, ensure_ascii=False), flush=True)
    except (ConvertError, ConfigError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
