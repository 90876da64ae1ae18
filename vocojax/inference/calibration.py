"""The threshold of `vocos="auto"`, by split conformal prediction on held-out questions.

Each held-out question has a score: the lowest threshold with which `refine` would give an answer that is not the one
from all tokens. A new question disagrees at a threshold only if its score is below it. With the k-th lowest of n scores
as threshold, k = floor((1 - agreement) (n + 1)), that has at most the probability k / (n + 1), if the new question
comes from where the held-out ones do. No assumption about the model is made.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from vocojax.config import levels_of
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.cache import VocoCache
from vocojax.inference.many import answer_many
from vocojax.inference.refining import Calibration, entropies
from vocojax.inference.requests import Request

NEVER = 1e9  # nats: the score of a question that agrees at every threshold


@dataclass(frozen=True)
class Trace:
    """A question's answers at every level but the last.

    Attributes:
      entropies: of the answers' first tokens, in nats.
      agrees: whether the answer is that of the last level.
    """

    entropies: tuple[float, ...]
    agrees: tuple[bool, ...]

    @property
    def score(self) -> float:
        """The lowest entropy at which an answer that does not agree would stand; `NEVER` if there is none."""
        lowest = math.inf
        wrong = [NEVER]
        for entropy, is_same in zip(self.entropies, self.agrees, strict=True):
            if entropy < lowest and not is_same:
                wrong.append(entropy)
            lowest = min(lowest, entropy)
        return min(wrong)

    def level(self, threshold: float) -> int:
        """Returns the number of the level whose answer stands."""
        return next((place for place, entropy in enumerate(self.entropies) if entropy < threshold),
                    len(self.entropies))


class Reached(NamedTuple):
    """What a threshold does on some questions.

    Attributes:
      agreement: share of answers that are those from all tokens.
      mean_tokens: mean VoCo tokens of each unit that the answers are read from.
    """

    agreement: float
    mean_tokens: float


def threshold_of(traces: Sequence[Trace], agreement: float) -> float:
    """Returns the highest threshold that keeps the agreement.

    Raises:
      InputError: the agreement is no share, or there are too few questions for it.
    """
    if not 0 < agreement < 1:
        raise InputError(f"agreement must be between 0 and 1, such as 0.99, got {agreement}")
    rank = math.floor((1 - agreement) * (len(traces) + 1) + 1e-9)
    if rank < 1:
        raise InputError(f"an agreement of {agreement} needs at least {math.ceil(1 / (1 - agreement) - 1e-9) - 1:,} "
                         f"held-out questions, got {len(traces):,}")
    return sorted(trace.score for trace in traces)[rank - 1]


def reached(traces: Sequence[Trace], levels: Sequence[int], threshold: float) -> Reached:
    """Returns the agreement and the mean number of tokens on questions."""
    chosen = [trace.level(threshold) for trace in traces]
    agrees = [(*trace.agrees, True)[place] for trace, place in zip(traces, chosen, strict=True)]
    return Reached(float(np.mean(agrees)), float(np.mean([levels[place] for place in chosen])))


def curve(traces: Sequence[Trace], levels: Sequence[int], points: int = 11) -> list[tuple[float, Reached]]:
    """Returns thresholds from none to all answers of the first level, with what each does on questions."""
    first = sorted({min(trace.entropies) for trace in traces})
    places = sorted({round(share * (len(first) - 1)) for share in np.linspace(0, 1, points)})
    thresholds = [0.0, *(float(np.nextafter(first[place], np.inf)) for place in places)]
    return [(threshold, reached(traces, levels, threshold)) for threshold in thresholds]


def trace_questions(
    assistant: Assistant, requests: Sequence[Request], batch_size: int = 32, progress: str | None = "questions"
) -> list[Trace]:
    """Answers questions at every level.

    Args:
      assistant: answers from caches.
      requests: the questions; each visual is compressed once per batch.
      batch_size: questions that are answered at once.
      progress: name of the progress bar; None for no bar.

    Raises:
      InputError: the model reads no caches or has one VoCo token only, or a question can't be answered.
    """
    levels = levels_of(max(assistant.processor.unit.vocos, 1))
    if not assistant.reads_caches or len(levels) < 2:
        raise InputError("only a model that reads two VoCo tokens or more can read fewer of them, this one reads "
                         f"{assistant.processor.unit.vocos if assistant.reads_caches else 'whole images'}")
    traces: list[Trace] = []
    with tqdm(total=len(requests), desc=progress, unit="question", disable=progress is None) as bar:
        for first in range(0, len(requests), batch_size):
            batch = _compressed(assistant, requests[first : first + batch_size])
            found: list[list[tuple[str, float]]] = [[] for _ in batch]
            for level in levels:
                answers = list(answer_many(assistant, batch, batch_size=batch_size, num_vocos=level, with_logits=True,
                                           progress=None))
                if failed := next((answer.error for answer in answers if answer.error), ""):
                    raise InputError(f"a held-out question can't be answered: {failed}")
                doubts = entropies(np.stack([np.asarray(answer.first_logits_V) for answer in answers]))
                for own, answer, doubt in zip(found, answers, doubts, strict=True):
                    own.append((answer.text, float(doubt)))
            traces += [Trace(tuple(doubt for _, doubt in own[:-1]), tuple(text == own[-1][0] for text, _ in own[:-1]))
                       for own in found]
            bar.update(len(batch))
    return traces


def calibration_of(assistant: Assistant, traces: Sequence[Trace], agreement: float) -> Calibration:
    """Returns the calibration of an assistant's model from its answers to held-out questions.

    Args:
      assistant: answered.
      traces: from `trace_questions`.
      agreement: share of new answers that must be those from all tokens.
    """
    return Calibration(levels_of(assistant.processor.unit.vocos), threshold_of(traces, agreement), agreement,
                       len(traces), assistant.fingerprint.digest)


def _compressed(assistant: Assistant, requests: Sequence[Request]) -> list[Request]:
    """Returns requests with caches in place of their visuals, each different visual compressed once."""
    sources = [each for request in requests for each in request.visuals if not isinstance(each, VocoCache)]
    caches = iter(assistant.caches_of([assistant.visual(source) for source in sources]) if sources else [])
    return [dataclasses.replace(request, visuals=tuple(
        each if isinstance(each, VocoCache) else next(caches) for each in request.visuals)) for request in requests]
