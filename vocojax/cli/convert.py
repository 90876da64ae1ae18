"""Converts weights between layouts.

    vocojax convert --source=llava-1.5-7b-hf --target=runs/llava --target_layout=orbax --verify
    vocojax convert --source=vicuna-7b-v1.5 --vision=clip-vit-large-patch14-336 --projector=mm_projector.bin \\
        --target=runs/parts --target_layout=orbax
    vocojax convert --source=runs/voco --target=voco-hf --target_layout=huggingface
    vocojax convert --source=runs/voco_lora --target=voco-lora --target_layout=peft --base=alignment-hf

A source is a directory in transformers' LLaVA layout, in the original LLaVA layout (also the released VoCo-LLaMA,
Shikra, LLaMA-VID), a LLaMA (alone, or with --vision), a LoRA adapter of PEFT's, which is merged into its base, or a run
of training. Each may be on the Hugging Face hub: hf://ORG/NAME[@REVISION].
"""

from collections.abc import Sequence

from absl import flags

from vocojax.cli.flag_checks import refuse_arguments

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("source", None, "Directory of the weights.", required=True)
    flags.DEFINE_string("target", None, "Directory to write, which must not exist.", required=True)
    layouts = ["orbax", "huggingface", "llava", "peft"]
    flags.DEFINE_enum("target_layout", None, layouts, "Layout to write; peft is a LoRA run's adapter.", required=True)
    flags.DEFINE_string("vision", None, "Vision tower, a CLIP directory or an EVA-CLIP file, if the source has none.")
    flags.DEFINE_string("projector", None, "File of the projector (mm_projector.bin), if the source has none.")
    flags.DEFINE_string("base", None, "Base model of a LoRA adapter, in the layout huggingface, if it is not where "
                        "adapter_config.json says; for --target_layout=peft, if it is not the run's init_from.")
    flags.DEFINE_string("tokenizer", None, "Directory of the tokenizer, if the source has none.")
    flags.DEFINE_integer("num_vocos", None, "VoCo tokens per image, if the source does not say it (otherwise 1, or 2 "
                         "for the released VoCo-LLaMA).", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Dtype to write; default: as stored.")
    flags.DEFINE_multi_string("allow_missing", [], "Regex of tensors that may be missing or unknown; repeatable.")
    flags.DEFINE_bool("verify", False, "Read the target again and report max |Δ| of every tensor and one digest.")


def main(arguments: Sequence[str]) -> None:
    """Converts."""
    refuse_arguments(arguments)
    from vocojax.pretrained.conversion import convert

    convert(
        FLAGS.source, FLAGS.target, FLAGS.target_layout, dtype=FLAGS.dtype, verify=FLAGS.verify, vision=FLAGS.vision,
        projector=FLAGS.projector, tokenizer=FLAGS.tokenizer, num_vocos=FLAGS.num_vocos,
        allow_missing=FLAGS.allow_missing, base=FLAGS.base,
    )
