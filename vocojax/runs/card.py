"""What a directory says about the model in it, besides its weights."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vocojax.config import ConfigError, LoraConfig, ModelConfig, build, config_to_dict
from vocojax.data.conversation import TEMPLATES
from vocojax.data.images import Fit
from vocojax.data.tokenizer import Tokenizer
from vocojax.files import local_directory, write_atomically
from vocojax.layout import UnitShape, Visibility, unit_shape
from vocojax.runs.directory import CheckpointError, run_config, run_path


@dataclass(frozen=True)
class ModelCard:
    """Everything that a directory says about its model, in whatever layout it is.

    Attributes:
      model: configuration of the model. Of a decoder alone, vision tower and projector have no meaning.
      tokenizer: with `<voco>`.
      template: name of the template that prompts are written with, a key of `data.conversation.TEMPLATES`.
      fit: how images become square.
      visibility: who sees whom, as the model was trained: `causal` for upper bounds, baselines and plain LLaVA.
      lora: factors that the checkpoint holds in addition to the kernels; rank 0 where there are none.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    template: str = "vicuna_v1"
    fit: Fit = "pad"
    visibility: Visibility = "voco"
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def unit(self) -> UnitShape:
        """Tokens and VoCo tokens of the model's units."""
        return unit_shape(self.model)

    def published(self) -> dict[str, Any]:
        """Returns the entries that an export adds to its `config.json`; `read_published` reads them."""
        return {
            "voco": dataclasses.asdict(self.model.voco),
            "prompt": {"template": self.template, "fit": self.fit, "visibility": self.visibility},
        }


@dataclass(frozen=True)
class _Prompt:
    """The entry `prompt` of an export's `config.json`, of which earlier versions wrote the first two."""

    template: str = "vicuna_v1"
    fit: Fit | None = None
    visibility: Visibility | None = None


def read_published(values: Mapping[str, Any], fit: Fit, visibility: Visibility) -> dict[str, Any]:
    """Reads what an export of this project says in its `config.json` of prompts and images.

    Args:
      values: the file's content.
      fit: for a directory that does not say it.
      visibility: likewise.

    Returns:
      `template`, `fit` and `visibility`, as keyword arguments of `ModelCard`.

    Raises:
      ConfigError: an entry is unknown or has a value that it can't have.
    """
    said = build(_Prompt, values.get("prompt") or {}, "prompt")
    if said.template not in TEMPLATES:
        raise ConfigError("prompt.template", f"must be one of {sorted(TEMPLATES)}, got {said.template!r}")
    return {"template": said.template, "fit": said.fit or fit, "visibility": said.visibility or visibility}


def read_card(workdir: str | Path, tokenizer: str | Path | None = None) -> ModelCard:
    """Reads the card of a run, or of a directory that a conversion wrote for training.

    Args:
      workdir: the run's directory, local or remote.
      tokenizer: directory of the tokenizer, in place of the run's own.

    Raises:
      CheckpointError: the directory holds no run of a stage, or no usable tokenizer.
    """
    values = run_config(workdir)
    data = values.get("data", {})
    if "model" not in values:
        raise CheckpointError(f"{workdir}/config.json: has no entry 'model'; a run of a training stage has one")
    try:
        model = build(ModelConfig, values["model"], "model")
        lora = build(LoraConfig, values.get("lora", {}), "lora")
        said = read_published({"prompt": {"visibility": values.get("visibility"),
                                          **{key: data[key] for key in ("template", "fit") if key in data}}},
                              "pad", "voco")
    except ConfigError as error:
        raise CheckpointError(f"{workdir}/config.json: {error}") from None
    own = run_path(workdir) / "tokenizer"
    home = tokenizer or (own if own.is_dir() else data.get("tokenizer") or own)
    try:
        with local_directory(home) as local:
            return ModelCard(model=model, tokenizer=Tokenizer.from_directory(local), lora=lora, **said)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{home}: no usable tokenizer ({str(error).splitlines()[0]}); name a directory that has "
                              "one with --tokenizer") from None


def write_card(directory: Path, card: ModelCard) -> None:
    """Writes the card of a run that has made no step: `config.json` and `tokenizer/`."""
    card.tokenizer.save(directory / "tokenizer")
    values = {
        "model": config_to_dict(card.model),
        "data": {"template": card.template, "fit": card.fit},
        "visibility": card.visibility,
    }
    write_atomically(directory / "config.json", json.dumps(values, indent=2) + "\n")
