"""Scores of benchmarks, and answers to fixed prompts, while a run trains.

`vocojax train` asks the benchmarks of `validation.benchmarks` with the run's current weights, through the same
assistant and the same scores as `vocojax evaluate`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vocojax.config import ConfigError
from vocojax.data.conversation import template
from vocojax.data.tokenizer import Tokenizer
from vocojax.errors import VocojaxError
from vocojax.evaluation.benchmarks.base import Benchmark, Item
from vocojax.evaluation.benchmarks.registry import expand, open_benchmark
from vocojax.evaluation.tables.page import first_picture, shown_gold
from vocojax.inference.assistant import Assistant
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request
from vocojax.models.voco import VocoLlama
from vocojax.parallel import processes
from vocojax.training.config import SCORE, StageConfig, ValidationConfig
from vocojax.training.scoring import Sample, Scores

LOG = logging.getLogger(__name__)
BATCH = 32  # questions that are answered at once
SAMPLES = 4  # of each benchmark, to look at


@dataclass(frozen=True)
class _Asked:
    """A benchmark with those of its questions that are asked."""

    benchmark: Benchmark
    items: Sequence[Item]


class BenchmarkScorer:
    """A `training.scoring.Scorer` that asks benchmarks and prompts.

    Processes share the questions, exchange the answers, and score all of them.

    Args:
      config: of the stage.
      tokenizer: of the stage.

    Raises:
      ConfigError: a benchmark is unknown, its files are missing, or it can't be scored here.
    """

    def __init__(self, config: StageConfig, tokenizer: Tokenizer):
        self._config, self._tokenizer = config, tokenizer
        self._asked = _open(config.validation)
        self._prompts = [Request(question, (image,) if image else ()) for image, question in config.validation.prompts]
        self._requests = [request for asked in self._asked for request in asked.benchmark.requests(asked.items)]
        self._requests += self._prompts

    def __call__(self, model: VocoLlama, mesh: Mesh, should_continue: Callable[[], bool]) -> Scores:
        """Returns the scores of a model, and on process 0 some of its answers with their pictures."""
        data = self._config.data
        assistant = Assistant(model, self._tokenizer, template(data.template), self._config.visibility, data.fit,
                              mesh=mesh)
        texts = self._answers(assistant, should_continue)
        if texts is None:
            return Scores()
        values: dict[str, float] = {}
        samples: list[Sample] = []
        first = 0
        for asked in self._asked:
            own, first = texts[first : first + len(asked.items)], first + len(asked.items)
            values |= _value(asked, own)
            samples += _samples(asked, own) if processes.is_first() else []
        if processes.is_first():
            samples += [_prompt_sample(number, request, text)
                        for number, (request, text) in enumerate(zip(self._prompts, texts[first:], strict=True))]
        return Scores(values, tuple(samples))

    def _answers(self, assistant: Assistant, should_continue: Callable[[], bool]) -> list[str | None] | None:
        """Returns the answers to all requests on all processes; None if `should_continue` ended them.

        Every process answers a part of them, in as many batches as the others.
        """
        index, count = jax.process_index(), jax.process_count()
        share = -(-len(self._requests) // count)
        own = self._requests[index * share : (index + 1) * share]
        texts: list[str | None] = []
        for first in range(0, share, BATCH):
            if batch := own[first : first + BATCH]:
                texts += [_text(answer) for answer in answer_many(assistant, batch, batch_size=BATCH, progress=None)]
            if not should_continue():
                return None
        return [text for part in processes.from_all("answers while training", texts) for text in part]


def open_scorer(config: StageConfig, tokenizer: Tokenizer) -> BenchmarkScorer:
    """Returns the scorer of a stage's `validation.benchmarks` and `validation.prompts`; see `stage.train`."""
    return BenchmarkScorer(config, tokenizer)


def subset(items: Sequence[Item], count: int) -> list[Item]:
    """Returns about `count` questions, evenly spread: whole groups of questions about the same visuals."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(item.visuals, []).append(item)
    chosen = min(len(groups), max(1, round(count / len(items) * len(groups))))
    every = list(groups.values())
    return [item for number in range(chosen) for item in every[number * len(every) // chosen]]


def _open(validation: ValidationConfig) -> list[_Asked]:
    """Opens the benchmarks, looks for the images, and scores empty answers: what can't be scored fails at the start."""
    try:
        benchmarks = [open_benchmark(name, validation.data_root) for name in expand(validation.benchmarks)]
        asked = [_Asked(benchmark, subset(benchmark.items, validation.questions)) for benchmark in benchmarks]
        for each in asked:
            if each.benchmark.counts_unreadable or all(item.gold is None for item in each.items):
                each.benchmark.score([""] * len(each.items), items=each.items)
    except VocojaxError as error:
        raise ConfigError("validation.benchmarks", f"can't be asked while training: {error}") from None
    for each in asked:
        paths = [path for item in each.items for path in item.visuals if isinstance(path, Path)]
        if missing := [path for path in paths if not path.exists()]:
            raise ConfigError("validation.benchmarks", f"has {each.benchmark.name}, of which {len(missing):,} of "
                              f"{len(paths):,} images are missing, the first is {missing[0]}; set validation.data_root")
    for image, _ in validation.prompts:
        if image and not Path(image).exists():
            raise ConfigError("validation.prompts", f"names the image {image}, which is not there")
    return asked


def _value(asked: _Asked, texts: Sequence[str | None]) -> dict[str, float]:
    """Returns a benchmark's score by its metric's name; {}, with a warning, where no answer could be scored."""
    try:
        return {f"{SCORE}{asked.benchmark.name}": asked.benchmark.score(texts, items=asked.items).value}
    except VocojaxError as error:
        LOG.warning("no score while training: %s", error)
        return {}


def _text(answer: Any) -> str | None:
    """Returns an answer's text; None, with a warning, for a question that could not be answered."""
    if answer.error:
        LOG.warning("a question of the validation was not answered: %s", answer.error)
        return None
    return answer.text.strip()


def _samples(asked: _Asked, texts: Sequence[str | None]) -> list[Sample]:
    """Returns the first answers about different visuals."""
    first: dict[Any, int] = {}
    for place, item in enumerate(asked.items):
        first.setdefault(item.visuals, place)
    found = []
    for number, place in enumerate(list(first.values())[:SAMPLES]):
        item = asked.items[place]
        picture = first_picture(asked.benchmark.visual(item.visuals[0])) if item.visuals else None
        text = _markdown(asked.benchmark.prompt(item), texts[place], shown_gold(item.gold))
        found.append(Sample(f"{SCORE}{asked.benchmark.name}/{number}", text, picture))
    return found


def _prompt_sample(number: int, request: Request, text: str | None) -> Sample:
    picture = first_picture(request.visuals[0]) if request.visuals else None  # type: ignore[arg-type]
    return Sample(f"{SCORE}prompt/{number}", _markdown(str(request.conversation), text), picture)


def _markdown(question: str, answer: str | None, gold: str = "") -> str:
    lines = [f"**{question.strip()}**", f"answer: {'(none)' if answer is None else answer or '(nothing)'}"]
    return "\n\n".join([*lines, f"gold: {gold}"] if gold else lines)
