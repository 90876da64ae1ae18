"""Stage 2 with LoRA: the decoder stays as it is, and factors of rank 128 learn in its place; for fewer chips.

    python launch/train.py --config=configs/voco_lora.py --workdir=runs/voco_2_lora --config.model.voco.num_vocos=2 \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/alignment

Rank, alpha and the factors' learning rate are those of LLaVA-1.5's LoRA script; rows and steps are configs/voco.py's.
That script trains the projector at 2e-5, a tenth of the factors' rate; here both have one. The row of the <voco> token
in `decoder/embedding` is the decoder's and so stays as it is, as long as `decoder/embedding` is not moved to `train`.
Whatever reads the run (launch/convert.py, `Assistant.from_run`, the `init_from` of another stage) finds the factors
merged.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(preset_name: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    return ConfigDict(all_keys(
        name="voco_lora",
        model=config_to_dict(preset(preset_name)),
        data={"template": "vicuna_v1", "row_length": 2048, "images_per_row": 3},
        lora={"rank": 128, "alpha": 256.0, "targets": ["decoder/blocks/.*/kernel"]},
        train=["projector/.*", ".*/lora/[ab]"],
        freeze=["vision/.*", "decoder/(?!.*/lora/).*"],
        visibility="voco",
        optimizer={"learning_rate": 2e-4},
        batch_size=64,
        steps=10_400,
    ))
