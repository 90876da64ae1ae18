"""Answers of a run's current weights while it trains: scores of benchmarks, and samples to look at.

Who asks and who scores is given to `stage.train` (`evaluation.training_scores.open_scorer`). This module gives them the
weights: those that train, or their averages, where they lie. Only in a run of several processes each gets a copy for
its own devices, in which it is cut over them; it is freed when the questions are answered.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from vocojax.data.tokenizer import Tokenizer
from vocojax.models.parameters import Parameters, with_parameters
from vocojax.models.voco import VocoLlama
from vocojax.parallel.mesh import AXES
from vocojax.parallel.shardings import parameter_shardings
from vocojax.training.config import StageConfig
from vocojax.training.program import Program
from vocojax.training.step import TrainState


@dataclass(frozen=True)
class Sample:
    """A question that was answered, to be looked at.

    Attributes:
      tag: under which it is logged, such as `validation/gqa/0`.
      text: question, answer and, where there is one, the gold answer, in Markdown.
      picture_HWC: uint8 RGB; None for a question without an image.
    """

    tag: str
    text: str
    picture_HWC: np.ndarray | None = None


@dataclass(frozen=True)
class Scores:
    """What the answers of one state are worth.

    Attributes:
      values: `validation/BENCHMARK` -> score; the same on all processes.
      samples: to look at; on process 0.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()


class Scorer(Protocol):
    """Asks a model. All processes call it alike, each with a model on its own devices."""

    def __call__(self, model: VocoLlama, mesh: Mesh, should_continue: Callable[[], bool]) -> Scores:
        """Returns the scores of a model.

        Args:
          model: to ask; its parameters lie on `mesh`.
          mesh: this process's devices.
          should_continue: to be called now and then, on all processes alike; after False the scores are `Scores()`.
        """


OpenScorer = Callable[[StageConfig, Tokenizer], Scorer]


class Scoring:
    """The scores of a state, by a scorer.

    Args:
      program: of the stage.
      scorer: asks.
    """

    def __init__(self, program: Program, scorer: Scorer):
        self._program, self._scorer = program, scorer
        self._mesh = program.mesh if jax.process_count() == 1 else _own_mesh(program.mesh, jax.process_index())

    def __call__(self, state: TrainState, should_continue: Callable[[], bool]) -> Scores:
        """Returns the scores of a state, which is left as it is; see `Scorer`."""
        parameters = state.parameters
        if jax.process_count() > 1:
            parameters = self._copy(parameters)
        with jax.set_mesh(self._mesh):  # in place of the stage's, which other processes' devices belong to
            return self._scorer(with_parameters(self._program.model, parameters), self._mesh, should_continue)

    def _copy(self, parameters: Parameters) -> Parameters:
        """Returns a copy of parameters that every process has whole, cut over its own devices."""
        own = [_own_mesh(self._program.mesh, process).devices for process in range(jax.process_count())]
        everywhere = Mesh(np.stack(own), ("process", *AXES), axis_types=(AxisType.Auto,) * (len(AXES) + 1))
        here = parameter_shardings(self._program.model, self._mesh)
        copies = jax.device_put(parameters, {
            name: NamedSharding(everywhere, here[name].spec) for name in parameters})
        return {name: _local_part(copies[name], here[name]) for name in parameters}


def _own_mesh(mesh: Mesh, process: int) -> Mesh:
    """Returns a mesh over the devices of one process, in their order in `mesh`; parameters are cut over all of them."""
    devices = np.array([device for device in mesh.devices.flat if device.process_index == process])
    shape = tuple(len(devices) if axis == "fsdp" else 1 for axis in AXES)
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _local_part(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns this process's copy of an array as an array of its own devices."""
    parts = {shard.device: shard.data for shard in array.addressable_shards}
    return jax.make_array_from_single_device_arrays(array.shape, sharding,
                                                    [parts[device] for device in sharding.mesh.devices.flat])
