"""The loop around an optimizer step: batches in, progress bar, TensorBoard scalars, checkpoints, resume.

It knows nothing of what is trained: a state, a jitted step and a stream of batches are its arguments.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from vocojax.training.checkpoints import Checkpoints

State = TypeVar("State")


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


class Stream(Protocol):
    """Batches that can be saved and resumed."""

    def __next__(self) -> Mapping[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LoopConfig:
    """name: shown in the progress bar, on line `position`; steps: in all, those of earlier runs included."""

    name: str
    steps: int
    log_every: int
    position: int = 0


def run(
    config: LoopConfig,
    workdir: str | Path,
    state: State,
    first_step: int,
    step: Callable[[State, Mapping[str, Any]], tuple[State, dict[str, jax.Array]]],
    stream: Stream,
    checkpoints: Checkpoints,
    save: Callable[[int, State], None],
    scalars: Callable[[], Mapping[str, float]] = dict,
) -> State:
    """Trains from `first_step` to `config.steps`.

    Metrics stay on the device and are fetched every `log_every` steps; nothing waits for the device in between.

    Args:
      step: (state, host batch) -> (state, metrics); metrics hold at least `loss`; `tokens` gives tokens/s.
      save: writes a checkpoint of the state behind that many steps.
      scalars: further values to log, such as the data's counts.

    Raises:
      NonFiniteLoss: names the step; the last checkpoint was written before it.
    """
    history = Path(workdir) / "metrics.jsonl"
    _forget_after(history, first_step)
    writer = SummaryWriter(str(workdir), purge_step=first_step + 1)
    bar = tqdm(total=config.steps, initial=first_step, desc=config.name, unit="step", dynamic_ncols=True,
               position=config.position)
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    since = time.perf_counter()
    try:
        for number in range(first_step + 1, config.steps + 1):
            state, metrics = step(state, next(stream))
            pending.append((number, metrics))
            saves = number % checkpoints.every == 0 or number == config.steps
            if saves or number % config.log_every == 0:
                fetched = [(n, {k: float(v) for k, v in m.items()}) for n, m in jax.device_get(pending)]
                pending = []
                _require_finite(fetched, workdir, checkpoints)
                elapsed, since = time.perf_counter() - since, time.perf_counter()
                rate = sum(m.get("tokens", 0.0) for _, m in fetched) / elapsed
                _log(writer, history, fetched, {"tokens_per_second": rate, **scalars()})
                bar.set_postfix_str(f"loss {fetched[-1][1]['loss']:.4f}, {rate:,.0f} tokens/s")
                bar.update(len(fetched))
            if saves:
                save(number, state)
        checkpoints.wait()
    finally:
        bar.close()
        writer.close()
    return state


def _require_finite(
    fetched: list[tuple[int, dict[str, float]]], workdir: str | Path, checkpoints: Checkpoints
) -> None:
    for number, metrics in fetched:
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics.get("grad_norm", 0.0)):
            checkpoints.wait()
            kept = "no checkpoint was written before it" if checkpoints.latest is None else (
                f"the last good checkpoint is step {checkpoints.latest} in {workdir}")
            raise NonFiniteLoss(f"step {number}: loss {metrics['loss']}, gradient norm {metrics.get('grad_norm')}; "
                                f"{kept}. Lower optimizer.learning_rate or look at this step's data.")


def _log(
    writer: SummaryWriter, history: Path, fetched: list[tuple[int, dict[str, float]]], extra: Mapping[str, float]
) -> None:
    last = fetched[-1][0]
    for number, metrics in fetched:
        for key, value in metrics.items():
            writer.add_scalar(f"train/{key}", value, number)
    for key, value in extra.items():
        writer.add_scalar(key if "/" in key else f"train/{key}", value, last)
    with history.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": n, **m}) + "\n" for n, m in fetched)


def _forget_after(history: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run will take again."""
    if history.exists():
        lines = [line for line in history.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        history.write_text("".join(line + "\n" for line in lines))
