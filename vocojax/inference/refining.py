"""Ask cheap, refine when unsure: a question is read from few VoCo tokens, and from more where the answer is unsure.

A unit's first n VoCo tokens are the same whatever follows them, so one cache of N holds all smaller ones. A question is
answered from the fewest tokens first. Where the entropy of the answer's first token is not below a threshold, it is
asked again with the next level's tokens. The threshold is calibrated (`inference.calibration`), so that the answers
agree with those from all tokens as often as was asked for.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vocojax.errors import InputError
from vocojax.files import is_remote, parse_json, write_atomically
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.runs.directory import run_path

FILE = "refining.json"
# (numbers of the questions, VoCo tokens of each unit) -> their answers, and the fp32 logits [B, V] of the first tokens.
Ask = Callable[[Sequence[int], int], tuple[list[str], np.ndarray]]


@dataclass(frozen=True)
class Calibration:
    """The rule by which a model's questions are refined.

    Attributes:
      levels: VoCo tokens of each unit that are read, ascending; the last is all of them.
      threshold: an answer whose entropy, in nats, is below it stands.
      agreement: share of the answers that agree with those from all tokens, as asked for.
      questions: how many held-out questions the threshold comes from.
      model: digest of the fingerprint of the only model that it applies to.
    """

    levels: tuple[int, ...]
    threshold: float
    agreement: float
    questions: int
    model: str

class Refined(NamedTuple):
    """Answers with what they took.

    Attributes:
      texts: the answers.
      tokens: VoCo tokens of each unit that each answer was read from.
    """

    texts: list[str]
    tokens: list[int]


def entropies(logits_BV: np.ndarray) -> np.ndarray:
    """Returns the entropy [B] of each row's distribution, in nats; tokens with the logit -inf can't be drawn."""
    shifted = np.asarray(logits_BV, np.float64) - np.max(logits_BV, axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    p = np.exp(log_p)
    return -(p * np.where(p > 0, log_p, 0.0)).sum(-1)


def refine(ask: Ask, count: int, calibration: Calibration) -> Refined:
    """Answers questions from few tokens, and again from more where the answer is unsure.

    Args:
      ask: answers some of the questions, given their places, from a number of tokens.
      count: how many questions there are.
      calibration: the rule.
    """
    texts, tokens, unsure = [""] * count, [0] * count, list(range(count))
    for level in calibration.levels:
        answers, logits_BV = ask(unsure, level)
        for place, text in zip(unsure, answers, strict=True):
            texts[place], tokens[place] = text, level
        above = entropies(logits_BV) >= calibration.threshold
        unsure = [place for place, is_unsure in zip(unsure, above, strict=True) if is_unsure]
        if not unsure:
            break
    return Refined(texts, tokens)


def checked(
    calibration: Calibration | None, digest: str, tokens_per_unit: int, sampling: SamplingConfig
) -> Calibration:
    """Returns a calibration that applies to what is asked.

    Args:
      calibration: of the checkpoint.
      digest: of the model's fingerprint.
      tokens_per_unit: that the cache holds.
      sampling: of the answers.

    Raises:
      InputError: there is none, or it does not apply.
    """
    if calibration is None:
        raise InputError("vocos='auto' needs a calibration beside the checkpoint: run vocojax calibrate, or set "
                         "assistant.calibration")
    if calibration.model != digest:
        raise InputError(f"the calibration of vocos='auto' is of model {calibration.model[:12]}, and this is "
                         f"{digest[:12]} (other weights, or another dtype): run vocojax calibrate again")
    if sampling.draws:
        raise InputError("vocos='auto' is calibrated for greedy answers: leave out the temperature")
    if tokens_per_unit != calibration.levels[-1]:
        raise InputError(f"vocos='auto' reads up to {calibration.levels[-1]} VoCo tokens, and the cache holds "
                         f"{tokens_per_unit}: give the whole cache")
    return calibration


def write_calibration(directory: str | Path, calibration: Calibration) -> None:
    """Writes a calibration beside a checkpoint."""
    write_atomically(run_path(directory) / FILE, json.dumps(asdict(calibration), indent=2) + "\n")


def read_calibration(directory: str | Path) -> Calibration | None:
    """Reads the calibration beside a checkpoint; None if there is none.

    Raises:
      InputError: the file is damaged.
    """
    path = run_path(directory) / FILE
    if (not is_remote(directory) and not path.parent.is_dir()) or not path.exists():
        return None
    try:
        values = parse_json(path.read_bytes())
        return Calibration(tuple(map(int, values["levels"])), float(values["threshold"]), float(values["agreement"]),
                           int(values["questions"]), str(values["model"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove it, or run vocojax calibrate again") from None
