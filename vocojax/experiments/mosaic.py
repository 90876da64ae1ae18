"""The paper's tables on mosaics, an embedded task on which compression costs something."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ml_collections import ConfigDict
from PIL import Image

from vocojax.data.conversation import Turn, template
from vocojax.data.sources.easy_vqa import Split
from vocojax.data.sources.mosaic import CAPTION, MosaicSource, bits_per_image
from vocojax.data.tokenizer import Tokenizer
from vocojax.evaluation import report
from vocojax.evaluation.metrics import accuracy_by_kind
from vocojax.evaluation.retention import Score
from vocojax.experiments.jobs import VISION, Runs, share_compilations
from vocojax.experiments.mosaic_benchmark import MosaicBenchmark
from vocojax.experiments.mosaic_refining import Refining, measure, of_seeds
from vocojax.experiments.mosaic_report import worst, write_mosaic_report
from vocojax.experiments.mosaic_tables import LOWER, UPPER, SeedRow, format_tables, rows_by_seed
from vocojax.files import write_atomically
from vocojax.inference.assistant import Assistant
from vocojax.inference.many import answer_many
from vocojax.layout import Visibility, lay_out_sample, unit_shape

ALIGNMENT, UPPER_STAGE = "alignment", "upper_bound"
BEST = "pool"  # the recipe that does best on the validation split, see docs/science.md


@dataclass(frozen=True)
class Arm:
    """A row of the tables.

    Attributes:
      name: shown in them.
      stage: whose run is read.
      visibility: the mask that it is read through.
      num_vocos: how many VoCo tokens are read; None for all.
    """

    name: str
    stage: str
    visibility: Visibility
    num_vocos: int | None = None


def voco(number: int, recipe: str = "") -> Arm:
    """Returns the row of a model that was trained with this number of VoCo tokens, plainly or by a recipe."""
    name = f"VoCo-{number}" + (f" + {recipe}" if recipe else "")
    return Arm(name, f"voco_{number}" + (f"+{recipe}" if recipe else ""), "voco")


ARMS = (
    Arm(UPPER, UPPER_STAGE, "causal"),
    *(voco(number) for number in (1, 2, 4, 8)),
    *(voco(number, BEST) for number in (1, 2, 4, 8)),
    Arm("Avg. Pool + Linear", "avg_pool", "causal"),
    Arm("Q-Former", "qformer", "causal"),
    Arm("Downsampled image", "downsample", "causal"),
    Arm("Random", "random", "causal"),
    Arm("LLaMA-VID", "llama_vid", "causal"),
    Arm(LOWER, UPPER_STAGE, "voco"),
)
# Each alone, and the best together, with the numbers of VoCo tokens they are for; compared on the validation split.
RECIPES = (
    *(voco(1, recipe) for recipe in ("", "pool", "kl", "captions", "embedding_lr", "spread", "output", "closing",
                                     "pool+kl", "pool+output", "pool+closing")),
    *(voco(4, recipe) for recipe in ("", "pool", "own", "band", "band+own", "pool+band", "pool+output")),
    *(voco(8, recipe) for recipe in ("", "pool", "own", "output", "pool+own")),
)
# Table 4: trained with 8 VoCo tokens, read with fewer; as in the paper, and so that any number may be read.
ELASTIC = "voco_8+own+nested+elastic"
TABLE_4 = tuple(Arm(f"{name}, {number} read", stage, "voco", number)
                for name, stage in (("VoCo-8", "voco_8"), ("VoCo-8 elastic", ELASTIC)) for number in (8, 4, 2, 1))


@dataclass
class Mosaic:
    """The trainings and evaluations of the tables.

    Attributes:
      get_config: returns a stage's config by its name (`configs/mosaic.py`).
      workdir: for runs, answers and tables; what is finished in it is not repeated.
      seeds: everything is trained once for each.
      arms: the rows.
      recipes: rows that are compared on the validation split; none by default.
      steps: number of steps by stage, in place of the configs'; also of `vision`.
      canvases: how many to ask about; None for all.
    """

    get_config: Callable[[str], ConfigDict]
    workdir: Path
    seeds: Sequence[int] = (0,)
    arms: Sequence[Arm] = ARMS
    recipes: Sequence[Arm] = ()
    steps: Mapping[str, int] = field(default_factory=dict)
    canvases: int | None = None
    RESULT: ClassVar[str] = "tables.json"

    def __post_init__(self) -> None:
        self._runs = Runs(self.get_config, "configs/mosaic.py", self.workdir, self.steps)

    @property
    def table_4(self) -> tuple[Arm, ...]:
        """The rows of models that are read with fewer VoCo tokens; none without VoCo-8 among the rows."""
        return TABLE_4 if any(arm.stage == TABLE_4[0].stage for arm in self.arms) else ()

    def align(self) -> None:
        """Makes the tokenizer, and trains the tower and the alignment that all rows of a seed start from."""
        share_compilations(self.workdir)
        runs = self._runs
        source = MosaicSource("train")
        texts = {f"{q.text} {q.answer}" for canvas in range(len(source.tiles)) for q in source.questions(canvas)}
        runs.make_tokenizer([*texts, CAPTION, *map(str, range(source.grid**2 + 1))])
        runs.train([runs.tower_job(seed, UPPER_STAGE) for seed in self.seeds])
        runs.train([runs.stage_job(seed, ALIGNMENT, VISION) for seed in self.seeds])

    def train(self) -> None:
        """Trains every row's stage, each once per seed."""
        runs = self._runs
        stages = dict.fromkeys([UPPER_STAGE, *(arm.stage for arm in (*self.arms, *self.table_4, *self.recipes))])
        teachers = {stage: UPPER_STAGE if "+kl" in stage else "" for stage in stages}
        for taught in (False, True):  # teachers first
            runs.train([runs.stage_job(seed, stage, ALIGNMENT, teacher) for seed in self.seeds
                        for stage, teacher in teachers.items() if bool(teacher) == taught])

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints the tables and writes them with their report; returns the content of tables.json.

        The test split is read once, after all training. Recipes are compared on the validation split.
        """
        started = time.perf_counter()
        self.align()
        self.train()
        if self.recipes:
            self._compare_recipes()
        benchmark = MosaicBenchmark("test", self.canvases)
        rows = self._rows(benchmark, (*self.arms, *self.table_4))
        refining = self._refine() if self.table_4 else None
        self._runs.seconds["total"] = time.perf_counter() - started
        result: dict[str, Any] = {
            "rows": {arm.name: rows[arm.name] for arm in self.arms},
            "table_4": {arm.name: rows[arm.name] for arm in self.table_4},
            "refining": refining,
            "bits_per_image": bits_per_image(benchmark.source.grid),
            "vision_tokens": self._runs.model(UPPER_STAGE).unit_tokens,
            "questions": len(benchmark.items),
            "split": benchmark.split,
            "seeds": list(self.seeds),
            "seconds": {name: round(seconds, 1) for name, seconds in self._runs.seconds.items()},
        }
        write_atomically(self.workdir / self.RESULT, json.dumps(result, indent=2) + "\n")
        self._write_report(result, benchmark)
        print(format_tables(result))
        return result

    def _compare_recipes(self) -> None:
        """Writes recipes.json, the rows of all recipes on the validation split."""
        benchmark = MosaicBenchmark("validation", self.canvases)
        bounds = [arm for arm in self.arms if arm.name in (UPPER, LOWER)]
        rows = self._rows(benchmark, [*bounds, *self.recipes])
        content = {"rows": rows, "split": benchmark.split, "questions": len(benchmark.items),
                   "seeds": list(self.seeds)}
        write_atomically(self.workdir / "recipes.json", json.dumps(content, indent=2) + "\n")

    def _rows(self, benchmark: MosaicBenchmark, arms: Sequence[Arm]) -> dict[str, SeedRow]:
        with self._runs.timed("evaluation"):
            self._runs.each(ask, [self._asking(benchmark, arm, seed) for seed in self.seeds for arm in arms])
            return rows_by_seed({arm.name: [self.score(benchmark, arm, seed) for seed in self.seeds] for arm in arms})

    def _refine(self) -> dict[str, Any]:
        """Returns what the elastic model reads where it asks for more tokens only when it is unsure."""
        runs = self._runs
        with runs.timed("evaluation"):
            jobs = [Refining(runs.directory(seed, ELASTIC), self.canvases,
                             self.workdir / "refining" / f"seed_{seed}.json") for seed in self.seeds]
            runs.each(measure, jobs)
            return of_seeds([job.result for job in jobs])

    def _write_report(self, result: Mapping[str, Any], benchmark: MosaicBenchmark) -> None:
        runs, seed, items = self._runs, self.seeds[0], benchmark.items
        curves: dict[str, dict[int, SeedRow]] = {}
        for arm in self.arms:
            if arm.stage.startswith("voco_"):
                number, _, recipe = arm.stage.removeprefix("voco_").partition("+")
                curves.setdefault(recipe or "plain", {})[int(number)] = result["rows"][arm.name]
        answers = {arm.name: self.answers(benchmark, arm, seed) for arm in self.arms}
        shown = worst([item.gold for item in items], answers, UPPER, self.arms[1].name, 12)
        examples = []
        for index in shown:
            file = self.workdir / "examples" / f"{items[index].id.replace('/', '_')}.png"
            file.parent.mkdir(exist_ok=True)
            canvas = int(items[index].id.partition("/")[0])
            Image.fromarray(benchmark.source.pixels(canvas)).save(file)
            examples.append(report.Example(file, items[index].prompt, items[index].gold,
                                           {name: texts[index] for name, texts in answers.items()}))
        tokenizer = Tokenizer.from_directory(runs.tokenizer)
        write = template("bare").spans
        asked = [write((Turn("user", item.prompt), Turn("assistant", item.gold)), tokenizer.eos_token)
                 for item in items[:2]]
        sample = lay_out_sample("drawn", 1, asked, tokenizer, unit_shape(runs.model(self.arms[1].stage)), 1000)
        versions = json.loads((runs.directory(seed, UPPER_STAGE) / "versions.json").read_text())
        write_mosaic_report(self.workdir / "report.html", result, curves, sample, examples, versions)

    def score(self, benchmark: MosaicBenchmark, arm: Arm, seed: int) -> Score:
        """Returns a row's accuracy for one seed."""
        marks = [mark or 0.0 for mark in benchmark.score(self.answers(benchmark, arm, seed)).marks]
        return Score(sum(marks) / len(marks), accuracy_by_kind(marks, [item.kind for item in benchmark.items]))

    def answers(self, benchmark: MosaicBenchmark, arm: Arm, seed: int) -> list[str]:
        """Returns a row's answers for one seed, in the order of the questions."""
        texts: list[str] = json.loads(self._asking(benchmark, arm, seed).answers.read_text())
        return texts

    def _asking(self, benchmark: MosaicBenchmark, arm: Arm, seed: int) -> "Asking":
        name = f"{arm.stage}_{arm.visibility}" + (f"_{arm.num_vocos}_read" if arm.num_vocos else "")
        answers = self.workdir / "answers" / benchmark.split / f"seed_{seed}" / f"{name}.json"
        return Asking(arm, self._runs.directory(seed, arm.stage), benchmark.split, self.canvases, answers)


@dataclass(frozen=True)
class Asking:
    """The questions that one model is asked.

    Attributes:
      arm: the row.
      run: the model's run.
      split: of the canvases.
      canvases: how many; None for all.
      answers: the file that keeps the answers.
    """

    arm: Arm
    run: Path
    split: Split
    canvases: int | None
    answers: Path


def ask(asking: Asking, position: int) -> None:
    """Asks a model unless its answers to as many questions are kept; `position` is the line of the progress bar."""
    del position
    benchmark = MosaicBenchmark(asking.split, asking.canvases)
    if asking.answers.exists() and len(json.loads(asking.answers.read_text())) == len(benchmark.items):
        return
    assistant = Assistant.from_run(asking.run, asking.arm.visibility)
    answers = answer_many(assistant, benchmark.requests(), batch_size=256, num_vocos=asking.arm.num_vocos,
                          progress=None)
    texts = [answer.text for answer in answers]
    asking.answers.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(asking.answers, json.dumps(texts) + "\n")
