"""The loss on held-out data while a run trains: the same batches every time, by the stage's own objective."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vocojax.config import ConfigError
from vocojax.data.config import DataConfig
from vocojax.data.loader import BatchStream
from vocojax.training.config import HELD_OUT, StageConfig, ValidationConfig
from vocojax.training.objectives import TargetSums
from vocojax.training.plan import place, views
from vocojax.training.program import Program
from vocojax.training.step import TrainState

IN_FLIGHT = 2  # batches on their way to the device


class Validation:
    """The measurement of a state on the first `batches` batches of the validation data.

    It shares nothing with the stream that trains. Its threads run only while a measurement does.

    Args:
      config: of the stage.
      program: of the stage.
      process_index: which part of a batch's rows this process makes, as for the training stream.
      process_count: how many parts there are.

    Raises:
      ConfigError: the validation data can't be read.
    """

    def __init__(self, config: StageConfig, program: Program, process_index: int = 0, process_count: int = 1):
        self._config, self._program = config, program
        self._share = process_index, process_count
        try:
            self._stream = BatchStream(
                config.model, validation_data(config.data, config.validation), config.batch_size, config.seed,
                *views(config), process_index=process_index, process_count=process_count, plan=config.plan,
            )
        except ConfigError as error:
            raise ConfigError(f"validation: {error.key}", error.problem) from None
        self._stream.close()
        self._start = self._stream.get_state()

    def __call__(self, state: TrainState, should_continue: Callable[[], bool]) -> dict[str, float]:
        """Returns `validation/loss` (nats per target, as `loss`) and `validation/accuracy` of a state.

        Waits for the device. The state is left as it is.

        Args:
          state: the state to measure.
          should_continue: called after every batch, on all processes alike; False ends the validation, which then
            returns {}.
        """
        mesh = self._program.mesh
        self._stream.set_state(self._start)
        totals: list[TargetSums] = []  # sums up to each of the last batches
        try:
            for _ in range(self._config.validation.batches):
                batch = place(next(self._stream), self._config, mesh, *self._share)
                with jax.transfer_guard("disallow"):
                    sums = self._program.evaluate(state, batch)
                    totals = [*totals[-IN_FLIGHT:], _add(totals[-1], sums) if totals else sums]
                totals[0].num_targets.block_until_ready()
                if not should_continue():
                    return {}
        finally:
            self._stream.close()
        whole = jax.device_get(totals[-1])
        count = max(int(whole.num_targets), 1)
        return dict(zip(HELD_OUT, (float(whole.loss) / count, float(whole.correct) / count), strict=True))


@jax.jit
def _add(one: TargetSums, other: TargetSums) -> TargetSums:
    return jax.tree.map(jnp.add, one, other)


def validation_data(data: DataConfig, validation: ValidationConfig) -> DataConfig:
    """Returns the data config of the validation: the stage's with another source.

    It is read in threads of this process, frames are not drawn at random, and text reads all VoCo tokens.
    """
    return dataclasses.replace(
        data, mixture=(), source=validation.source, split=validation.split, path=validation.path,
        image_root=validation.image_root, num_workers=0, frame_jitter=False, fewest_vocos=None,
        anneal_samples=0,
    )
