"""The model card: everything that a directory says about its model in addition to the weights."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from vocojax.config import ConfigError, LoraConfig, ModelConfig, build, config_to_dict
from vocojax.data.conversation import TEMPLATES
from vocojax.data.images import Fit
from vocojax.data.tokenizer import Tokenizer
from vocojax.files import files_below, local_directory, write_atomically
from vocojax.hub import local_copy
from vocojax.layout import UnitShape, Visibility, unit_shape
from vocojax.runs.checkpoint_files import first_line
from vocojax.runs.directory import CheckpointError, require_run_files, run_config, run_path, signed
from vocojax.sums import write_sums


@dataclass(frozen=True)
class ModelCard:
    """Everything about a model except its weights, read from a directory in any layout.

    Attributes:
      model: configuration of the model. Vision tower and projector have no meaning for a decoder alone.
      tokenizer: a tokenizer that knows `<voco>`.
      template: name of the template for prompts, a key of `data.conversation.TEMPLATES`.
      fit: how images become square.
      visibility: the mask that the model was trained with: `causal` for upper bounds, baselines and plain LLaVA.
      lora: LoRA factors that the checkpoint holds in addition to the kernels; rank 0 if there are none.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    template: str = "vicuna_v1"
    fit: Fit = "pad"
    visibility: Visibility = "voco"
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def unit(self) -> UnitShape:
        """Numbers of tokens in the model's units."""
        return unit_shape(self.model)

    def published(self) -> dict[str, Any]:
        """Returns the entries that an export adds to its `config.json`; `read_published` reads them."""
        return {
            "voco": dataclasses.asdict(self.model.voco),
            "prompt": {"template": self.template, "fit": self.fit, "visibility": self.visibility},
        }


@dataclass(frozen=True)
class _Prompt:
    """The entry `prompt` of an export's `config.json`. Earlier versions did not write `visibility`."""

    template: str | None = None
    fit: Fit | None = None
    visibility: Visibility | None = None


def read_published(
    values: Mapping[str, Any], fit: Fit, visibility: Visibility, template: str = "vicuna_v1"
) -> dict[str, Any]:
    """Reads the entry `prompt` of an export's `config.json`.

    Args:
      values: the file's content.
      fit: used if the file does not say it.
      visibility: used if the file does not say it.
      template: used if the file does not say it.

    Returns:
      `template`, `fit` and `visibility`, as keyword arguments of `ModelCard`.

    Raises:
      ConfigError: a key is unknown or a value is invalid.
    """
    said = build(_Prompt, values.get("prompt") or {}, "prompt")
    if (said.template or template) not in TEMPLATES:
        raise ConfigError("prompt.template", f"must be one of {sorted(TEMPLATES)}, got {said.template!r}")
    return {"template": said.template or template, "fit": said.fit or fit, "visibility": said.visibility or visibility}


def read_card(workdir: str | Path, tokenizer: str | Path | None = None) -> ModelCard:
    """Reads the card of a run, or of a directory that a conversion wrote in the layout `orbax`.

    Args:
      workdir: the run's directory, local or remote.
      tokenizer: directory of a tokenizer that replaces the run's own.

    Raises:
      CheckpointError: the directory does not hold a stage's run, its config is invalid, or it has no usable tokenizer.
    """
    values = run_config(workdir)
    data = values.get("data", {})
    if "model" not in values:
        raise CheckpointError(f"{workdir}/config.json: has no entry 'model'; use the directory of a stage's run")
    try:
        model = build(ModelConfig, values["model"], "model")
        lora = build(LoraConfig, values.get("lora", {}), "lora")
        said = read_published({"prompt": {"visibility": values.get("visibility"),
                                          **{key: data[key] for key in ("template", "fit") if key in data}}},
                              "pad", "voco")
    except ConfigError as error:
        raise CheckpointError(f"{workdir}/config.json: {error}") from None
    own = run_path(workdir) / "tokenizer"
    home = local_copy(tokenizer or (own if own.is_dir() else data.get("tokenizer") or own))
    if home == own:
        require_run_files(workdir, ["tokenizer/"])
    try:
        with local_directory(home) as local:
            card = ModelCard(model=model, tokenizer=Tokenizer.from_directory(local), lora=lora, **said)
    except Exception as error:  # transformers and tokenizers raise many types for damaged files
        raise CheckpointError(f"{home}: no usable tokenizer ({first_line(error)}); pass a directory that has one as "
                              "--tokenizer") from None
    vocabulary = signed(workdir).get("data", {}).get("vocabulary")
    if home == own and vocabulary not in (None, card.tokenizer.vocabulary_digest):
        raise CheckpointError(f"{own}: was changed after the run wrote it, its vocabulary is not the checkpoint's. "
                              "Copy it from a backup of the run, or pass the right one as --tokenizer")
    return card


def write_card(directory: Path, card: ModelCard) -> None:
    """Writes the card of a run before its first step: `config.json` and `tokenizer/`."""
    card.tokenizer.save(directory / "tokenizer")
    values = {
        "model": config_to_dict(card.model),
        "data": {"template": card.template, "fit": card.fit},
        "visibility": card.visibility,
    }
    write_atomically(directory / "config.json", json.dumps(values, indent=2) + "\n")
    write_card_sums(epath.Path(directory))


def write_card_sums(directory: epath.Path) -> None:
    """Writes the sums of `config.json` and of the files in `tokenizer/`, which `read_card` compares."""
    tokenizer = files_below(directory / "tokenizer")
    write_sums(directory, ["config.json", *(f"tokenizer/{name}" for name in tokenizer)])
