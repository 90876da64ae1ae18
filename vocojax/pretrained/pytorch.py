"""The hand-over to PyTorch: what an export has in addition to a plain LLaVA's files, so that it answers there.

The sources in `vocojax/pretrained/torch` need torch and transformers and nothing of this package. They are copied into
the export, and transformers runs them with `trust_remote_code=True`. This package never imports them.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from vocojax.data.conversation import TEMPLATES
from vocojax.data.tokenizer import OWN_MODULES
from vocojax.layout import Role, lay_out_unit, units_stand_alone
from vocojax.runs.card import ModelCard

SOURCES = Path(__file__).parent / "torch"
_CONFIGURATION, _MODELING, _PROCESSING = OWN_MODULES
_MODEL = f"{_MODELING}.VocoLlavaForConditionalGeneration"
# The entry `auto_map` of `config.json`: transformers' Auto classes and what they load from the directory.
AUTO_MAP: Mapping[str, str] = {
    "AutoConfig": f"{_CONFIGURATION}.VocoLlavaConfig",
    "AutoModel": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
}
# Entries of `VocoConfig` by which a model may differ from the paper's, and which the sources compute.
RECIPES = ("init", "rows")
_PROCESSOR_MAP: Mapping[str, str] = {"AutoProcessor": f"{_PROCESSING}.VocoLlavaProcessor"}

Base = tuple[str, str | None]


def write_sources(directory: Path, card: ModelCard, base: Base | None, rows: int) -> None:
    """Writes the sources, the chat template and the README of an export.

    Args:
      directory: the export.
      card: the model's card.
      base: name and revision of the base model, if the export is an adapter.
      rows: rows of the vocabulary in the tensors.
    """
    for source in sorted(SOURCES.glob("*.py")):
        shutil.copyfile(source, directory / source.name)
    (directory / "chat_template.jinja").write_text(chat_template(card.template), encoding="utf-8")
    (directory / "README.md").write_text(_readme(card, base, rows), encoding="utf-8")


def _readme(card: ModelCard, base: Base | None, rows: int) -> str:
    """Returns the README of an export: how the model is used in PyTorch."""
    tokenizer, vocos = card.tokenizer, card.unit.vocos
    bos, *newline = model_entry(card)["unit_ids"]
    lead = ", ".join([str(bos), f"{card.unit.tokens} x <image>", *map(str, newline), f"{vocos} x {tokenizer.voco_id}"])
    values = {
        "question": "What is in the picture?", "tokens": card.unit.tokens, "fit": card.fit, "template": card.template,
        "vocos": "1 VoCo token" if vocos == 1 else f"{vocos} VoCo tokens",
        "visibility": card.visibility, "meaning": _MEANING[card.visibility],
        "prompt": f"{tokenizer.huggingface.bos_token}<image>\\n{tokenizer.voco_token * vocos}\\n", "ids": lead,
        "rows": rows, "model_class": _MODEL,
    }
    if base is not None:
        name, revision = base
        values["base"] = json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
        return Template((SOURCES / "ADAPTER.md").read_text(encoding="utf-8")).substitute(values)
    caches = Template((SOURCES / "CACHES.md").read_text(encoding="utf-8")).substitute(values)
    values["caches"] = caches if units_stand_alone(card.visibility) else ""
    return Template((SOURCES / "README.md").read_text(encoding="utf-8")).substitute(values)


def chat_template(template: str) -> str:
    """Returns the Jinja template that writes conversations as one of `data.conversation.TEMPLATES` does."""
    values = {"template": template, "default_system": TEMPLATES[template].system}
    settings = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in values.items())
    return settings + (SOURCES / "chat_template.jinja").read_text(encoding="utf-8")


def model_entry(card: ModelCard) -> dict[str, Any]:
    """Returns the entry `vocojax` of `config.json`: the model's own config, and the ids of a unit's BOS and newline.

    The sources compute the model's fingerprint with it, and `open_source` reads the length of the vocabulary from it.
    """
    unit = lay_out_unit("unit", card.tokenizer, card.unit)
    unit_ids = unit.ids[(unit.roles == Role.BOS) | (unit.roles == Role.NEWLINE)].tolist()
    return {"model": dataclasses.asdict(card.model), "unit_ids": unit_ids}


def processor_entries(card: ModelCard) -> dict[str, Any]:
    """Returns the entries of `processor_config.json` that the sources read."""
    return {"auto_map": dict(_PROCESSOR_MAP), "image_size": card.model.vision.image_size,
            "image_seq_length": card.unit.tokens, "num_vocos": card.unit.vocos, "fit": card.fit}


def name_fast_tokenizer(directory: Path) -> None:
    """Makes `tokenizer_config.json` name the class that every version of transformers opens `tokenizer.json` with."""
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_MEANING = {
    "voco": "Its text sees whole images, which this model was not trained for, so its answers mean nothing: use "
            "it only to inspect or to convert the weights.",
    "causal": "This model was trained with LLaVA's own mask: with the right prompt and pixels, its answers are right.",
}
