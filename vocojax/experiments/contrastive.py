"""A short CLIP-style pretraining of a vision tower on captions (arXiv 2103.00020), for models without a pretrained one.

Captions repeat (two dozen of them describe all of easy-VQA), so every image of a batch has several positives: the
targets are spread evenly over the captions that equal its own. The text tower is a bag of words.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vocojax.config import VisionConfig, require_positive
from vocojax.data.images import load_image
from vocojax.data.sources import Source
from vocojax.data.tokenizer import Tokenizer
from vocojax.models.clip import ClipVision, normalise
from vocojax.models.layers import Linear, parameter
from vocojax.models.parameters import Parameters, abstract, parameters_of, with_parameters
from vocojax.runs.directory import write_run_files
from vocojax.runs.owner import owned
from vocojax.training import loop
from vocojax.training.checkpoints import Checkpoints
from vocojax.training.config import CheckpointConfig, OptimizerConfig
from vocojax.training.optimizer import make_optimizer
from vocojax.training.step import TrainState


@dataclass(frozen=True)
class ContrastiveConfig:
    """The pretraining of a vision tower; half of the images are mirrored.

    Attributes:
      vision: the tower.
      vocab_size: of the captions' tokenizer.
      steps: optimizer steps.
      batch_size: images per step.
      optimizer: AdamW's settings.
      seed: of the parameters and of the order of the data.
      log_every: steps between logged metrics.
    """

    vision: VisionConfig
    vocab_size: int
    steps: int = 3000
    batch_size: int = 48
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, b2=0.98, weight_decay=0.1)
    )
    seed: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "steps", "batch_size", "log_every")


class ContrastiveModel(nnx.Module):
    """A vision tower and a bag-of-words text tower with one embedding space."""

    def __init__(self, config: ContrastiveConfig, rngs: nnx.Rngs):
        width = config.vision.width
        self.vision = ClipVision(config.vision, rngs)
        self.image_projection = Linear(width, width, ("embed", None), use_bias=False, rngs=rngs)
        self.words = parameter(nnx.initializers.normal(1.0), (config.vocab_size, width), ("vocab", "embed"), rngs)
        self.text_projection = Linear(width, width, ("embed", None), use_bias=False, rngs=rngs)
        self.log_scale = parameter(nnx.initializers.constant(jnp.log(1 / 0.07)), (), (), rngs)

    def __call__(self, images_BHWC: jax.Array, captions_BS: jax.Array) -> jax.Array:
        """Returns logits fp32 [images, captions].

        Args:
          images_BHWC: uint8.
          captions_BS: int32 tokens, -1 for padding.
        """
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        image_BE = unit(self.image_projection(self.vision.pooled(normalise(images_BHWC, jnp.dtype(jnp.float32)))))
        is_word_BS1 = (captions_BS >= 0)[..., None]
        bag_BE = jnp.where(is_word_BS1, self.words[...][jnp.maximum(captions_BS, 0)], 0.0).sum(1)
        scale = jnp.exp(jnp.minimum(self.log_scale[...], jnp.log(100.0)))
        return scale * image_BE @ unit(self.text_projection(bag_BE)).T


def contrastive_loss(logits_BB: jax.Array, captions_BS: jax.Array) -> jax.Array:
    """Returns CLIP's symmetric cross-entropy, with targets spread evenly over equal captions."""
    same_BB = (captions_BS[:, None] == captions_BS[None]).all(-1).astype(jnp.float32)
    targets_BB = same_BB / same_BB.sum(-1, keepdims=True)
    rows = -(targets_BB * jax.nn.log_softmax(logits_BB, axis=1)).sum(1).mean()
    columns = -(targets_BB * jax.nn.log_softmax(logits_BB, axis=0)).sum(0).mean()
    return (rows + columns) / 2


class _CaptionStream:
    """Endless shuffled batches of images and caption tokens, which follow from seed and step."""

    def __init__(self, source: Source, config: ContrastiveConfig, tokenizer: Tokenizer):
        samples = [source[i] for i in range(len(source))]
        self._images = np.stack([load_image(s.images[0], config.vision.image_size) for s in samples])
        captions = [tokenizer.encode(s.threads[0][-1].text).ids for s in samples]
        longest = max(map(len, captions))
        self._captions = np.array([[*c, *[-1] * (longest - len(c))] for c in captions], np.int32)
        self._config, self._step = config, 0

    def __next__(self) -> Mapping[str, np.ndarray]:
        random = np.random.default_rng((self._config.seed, self._step))
        self._step += 1
        chosen = random.choice(len(self._images), self._config.batch_size, replace=False)
        images_BHWC, mirrored_B111 = self._images[chosen], random.random((len(chosen), 1, 1, 1)) < 0.5
        images_BHWC = np.where(mirrored_B111, images_BHWC[:, :, ::-1], images_BHWC)
        return {"images": images_BHWC, "captions": self._captions[chosen]}

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


def pretrain_vision(
    config: ContrastiveConfig, source: Source, tokenizer: Tokenizer, workdir: str | Path, bar_position: int = 0
) -> None:
    """Trains a tower on captioned images; a stage's `init_from` takes the `vision/...` parameters of its run.

    Resumes like a stage.

    Args:
      config: of the pretraining.
      source: images with captions.
      tokenizer: of the captions.
      workdir: the run's directory.
      bar_position: the terminal line of the progress bar.
    """

    def loss(model: ContrastiveModel, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits_BB = model(batch["images"], batch["captions"])
        best_B = logits_BB.argmax(1)
        hits = (batch["captions"][best_B] == batch["captions"]).all(-1).mean()
        return contrastive_loss(logits_BB, batch["captions"]), hits

    make = lambda rngs: ContrastiveModel(config, rngs)
    pretrain(config, make, _CaptionStream(source, config, tokenizer), loss, workdir, bar_position)


class Pretraining(Protocol):
    """What `pretrain` needs to know of a config."""

    @property
    def steps(self) -> int: ...

    @property
    def optimizer(self) -> OptimizerConfig: ...

    @property
    def seed(self) -> int: ...

    @property
    def log_every(self) -> int: ...


class ImageStream(Protocol):
    """Endless batches that can be resumed."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


Model = TypeVar("Model", bound=nnx.Module)


def pretrain(
    config: Pretraining, make: Callable[[nnx.Rngs], Model], stream: ImageStream,
    loss: Callable[[Model, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]], workdir: str | Path,
    bar_position: int = 0,
) -> None:
    """Trains all parameters of a model that has a vision tower as its attribute `vision`.

    Args:
      config: of the pretraining; it is the run's config.
      make: returns the model.
      stream: the batches.
      loss: of a model and a batch; returns the loss and the accuracy.
      workdir: the run's directory.
      bar_position: the terminal line of the progress bar.
    """
    model = abstract(lambda: make(nnx.Rngs(0)))
    optimizer = make_optimizer(config.optimizer, config.steps)

    @jax.jit
    def create(key: jax.Array) -> TrainState:
        parameters = parameters_of(make(nnx.Rngs(key)))
        return TrainState(jnp.int32(0), parameters, {}, optimizer.init(parameters), {})

    def of_parameters(parameters: Parameters, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return loss(with_parameters(model, parameters), batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        (value, hits), grads = jax.value_and_grad(of_parameters, has_aux=True)(state.trained, batch)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
        metrics = {"loss": value, "accuracy": hits, "grad_norm": optax.tree.norm(grads)}
        trained = optax.apply_updates(state.trained, updates)
        return state._replace(step=state.step + 1, trained=trained, optimizer=optimizer_state), metrics

    at_the_end = CheckpointConfig(every=config.steps, keep=1)
    with owned(workdir):
        write_run_files(workdir, config)
        with Checkpoints(workdir, at_the_end, config) as checkpoints:
            state, first_step, useful_seconds = create(jax.random.key(config.seed)), 0, 0.0
            if restored := checkpoints.restore(state):
                first_step, state, progress = restored
                stream.set_state(progress["data"])
                useful_seconds = progress["useful_seconds"]
            shown = loop.LoopConfig("vision", config.steps, config.log_every, bar_position)
            task = loop.Task(step, stream, jax.device_put)
            loop.run(shown, workdir, task, state, first_step, checkpoints, useful_seconds)
