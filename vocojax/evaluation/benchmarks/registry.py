"""All benchmarks by name. Wherever a name is asked for, a file of your own questions may stand."""

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.activitynet_qa import ActivityNetQa
from vocojax.evaluation.benchmarks.base import Benchmark
from vocojax.evaluation.benchmarks.easy_vqa import EasyVqaBenchmark
from vocojax.evaluation.benchmarks.egoschema import EgoSchema
from vocojax.evaluation.benchmarks.gqa import Gqa
from vocojax.evaluation.benchmarks.grit_refexp import GritRefexp
from vocojax.evaluation.benchmarks.mmbench import LETTER_ANSWER_CN, MmBench
from vocojax.evaluation.benchmarks.mme import Mme
from vocojax.evaluation.benchmarks.msrvtt_qa import MsrvttQa
from vocojax.evaluation.benchmarks.msvd_qa import MsvdQa
from vocojax.evaluation.benchmarks.mvbench import MvBench
from vocojax.evaluation.benchmarks.next_qa import NextQa
from vocojax.evaluation.benchmarks.ocrbench import OcrBench
from vocojax.evaluation.benchmarks.own_questions import OwnQuestions
from vocojax.evaluation.benchmarks.point_qa import PointQa
from vocojax.evaluation.benchmarks.pope import SPLITS, Pope
from vocojax.evaluation.benchmarks.rec import Rec
from vocojax.evaluation.benchmarks.reg import Reg
from vocojax.evaluation.benchmarks.science_qa import ScienceQa
from vocojax.evaluation.benchmarks.seed_image import SeedImage
from vocojax.evaluation.benchmarks.textvqa import TextVqa
from vocojax.evaluation.benchmarks.video_mme import VideoMme
from vocojax.evaluation.benchmarks.vizwiz import VizWiz
from vocojax.evaluation.benchmarks.vqav2 import VqaV2

Open = Callable[[Path], Benchmark]  # opens a benchmark, given the root of all data

REC_FILES = {  # data set and split -> Shikra's file
    "refcoco_val": "REC_refcoco_unc_val.jsonl",
    "refcoco_testA": "REC_refcoco_unc_testA.jsonl",
    "refcoco_testB": "REC_refcoco_unc_testB.jsonl",
    "refcoco+_val": "REC_refcoco+_unc_val.jsonl",
    "refcoco+_testA": "REC_refcoco+_unc_testA.jsonl",
    "refcoco+_testB": "REC_refcoco+_unc_testB.jsonl",
    "refcocog_val": "REC_refcocog_umd_val.jsonl",
    "refcocog_test": "REC_refcocog_umd_test.jsonl",
}
POINT_QUESTIONS = {  # variant -> its annotation file, and its field of the question
    "local": ("pointQA_local_{split}.jsonl", "question"),
    "twice_object": ("pointQA_twice_{split}.jsonl", "obj_question"),
    "twice_superclass": ("pointQA_twice_{split}.jsonl", "super_question"),
    "twice_general": ("pointQA_twice_{split}.jsonl", "general_question"),
}


def _mmbench(name: str, files: Sequence[str], ending: str | None = None) -> Open:
    return lambda root: MmBench(name, root, files, ending) if ending else MmBench(name, root, files)


def _rec(name: str, file: str) -> Open:
    return lambda root: Rec(name, root, file)


def _reg(name: str, file: str) -> Open:
    return lambda root: Reg(name, root, file)


def _point_qa(name: str, file: str, question: str, place: str) -> Open:
    return lambda root: PointQa(name, root, file, question, place)


def _pope(split: str) -> Open:
    return lambda root: Pope(root, (split,))


BENCHMARKS: Mapping[str, Open] = {
    "gqa": Gqa,
    "mmbench_en": _mmbench("mmbench_en", ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_en.tsv")),
    "mmbench_cn": _mmbench("mmbench_cn", ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "mmbench_dev_cn.tsv"),
                           LETTER_ANSWER_CN),
    "mmbench_en_test": _mmbench("mmbench_en_test", ("mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv")),
    "mmbench_cn_test": _mmbench("mmbench_cn_test", ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
                                LETTER_ANSWER_CN),
    "mme": Mme,
    "pope": Pope,
    **{f"pope_{split}": _pope(split) for split in SPLITS},
    "seed_image": SeedImage,
    "scienceqa_image": ScienceQa,
    "scienceqa": lambda root: ScienceQa(root, images_only=False),
    "vqav2_val": lambda root: VqaV2(root, "val2014"),
    "vqav2_test_dev": lambda root: VqaV2(root, "test-dev2015"),
    "vqav2_test": lambda root: VqaV2(root, "test2015"),
    "textvqa": TextVqa,
    "textvqa_no_ocr": lambda root: TextVqa(root, ocr=False),
    "vizwiz_val": lambda root: VizWiz(root, "val"),
    "vizwiz_test": lambda root: VizWiz(root, "test"),
    "ocrbench": OcrBench,
    **{name: _rec(name, file) for name, file in REC_FILES.items()},
    **{f"reg_{name}": _reg(f"reg_{name}", file) for name, file in REC_FILES.items()},
    "grit_refexp": GritRefexp,
    **{(name := f"pointqa_{variant}_{place}_{split}"):
       _point_qa(name, file.format(split=split), question, "bbox" if place == "box" else "point")
       for variant, (file, question) in POINT_QUESTIONS.items()
       for place in ("box", "point") for split in ("val", "test")},
    "msvd_qa": MsvdQa,
    "msrvtt_qa": MsrvttQa,
    "activitynet_qa": ActivityNetQa,
    "videomme": VideoMme,
    "mvbench": MvBench,
    "nextqa": NextQa,
    "egoschema_subset": EgoSchema,
    "egoschema": lambda root: EgoSchema(root, subset=False),
    "easy_vqa": lambda root: EasyVqaBenchmark(),
}

GROUPS: Mapping[str, Sequence[str]] = {
    "table1": ("gqa", "mmbench_en", "mme", "pope", "seed_image", "scienceqa_image", "vqav2_test_dev"),
    "rec": tuple(REC_FILES),
    "reg": tuple(f"reg_{name}" for name in REC_FILES),
    "pointqa": tuple(name for name in BENCHMARKS if name.startswith("pointqa_") and name.endswith("_test")),
    "video": ("msvd_qa", "msrvtt_qa", "activitynet_qa"),
}


def described() -> str:
    """Returns the names, one per line, and the groups with their members, for a terminal."""
    return "\n".join([*BENCHMARKS, "", *(f"{name}: {', '.join(members)}" for name, members in GROUPS.items())])


def expand(names: Sequence[str]) -> list[str]:
    """Returns benchmarks' names, those of a group in its place; files of questions are left as they are.

    Raises:
      InputError: a name is unknown.
    """
    found: list[str] = []
    for name in names:
        if name not in BENCHMARKS and name not in GROUPS and not is_file(name):
            near = difflib.get_close_matches(name, [*BENCHMARKS, *GROUPS], n=3) or [
                known for known in BENCHMARKS if known.startswith(name)][:3]
            hint = f", did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"benchmark {name!r} is unknown{hint} (--list names all; a file of questions "
                             "ends in .json or .jsonl)")
        found += GROUPS.get(name, (name,))
    return list(dict.fromkeys(found))


def is_file(name: str) -> bool:
    """Returns whether a name is that of a file of questions, see `OwnQuestions`."""
    return name.endswith((".json", ".jsonl"))


def result_name(name: str) -> str:
    """Returns the name that a benchmark's results have: its own, or its file's without the suffix."""
    return Path(name).stem if is_file(name) else name


def open_benchmark(name: str, root: str | Path) -> Benchmark:
    """Opens a benchmark.

    Args:
      name: of the registry, or a file of questions (`OwnQuestions`).
      root: of all data; for a file of questions, the directory of its images.

    Raises:
      InputError: the name is unknown, or an annotation file is missing or malformed.
    """
    if name not in BENCHMARKS and not is_file(name):
        expand([name])
        raise InputError(f"{name!r} is a group of benchmarks: {', '.join(GROUPS[name])}; open one of them")
    benchmark = OwnQuestions(Path(name), Path(root)) if is_file(name) else BENCHMARKS[name](Path(root))
    twice = [key for key, times in Counter(item.id for item in benchmark.items).items() if times > 1]
    if twice:
        raise InputError(f"{name}: {len(twice):,} ids of its annotation file in {root} are not unique, the first is "
                         f"{twice[0]!r}; is the file the official one?")
    return benchmark
