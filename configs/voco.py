"""Stage 2: projector and decoder learn to compress every image into VoCo tokens, on instructions.

    python launch/train.py --config=configs/voco.py --workdir=runs/voco_2 --config.model.voco.num_vocos=2 \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/alignment

The learning rate, warm-up and row length are the released code's. Its batch is 128 samples; a row packs about two, so
64 rows are a batch here, and 10,400 steps about two epochs of 665,000 samples. For the upper bound add
--config.visibility=causal; for the KL to one (paper Eq. 1), --config.distill.teacher=runs/upper_bound.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(preset_name: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    return ConfigDict(all_keys(
        name="voco",
        model=config_to_dict(preset(preset_name)),
        data={"template": "vicuna_v1", "row_length": 2048, "images_per_row": 3},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 2e-5},
        batch_size=64,
        steps=10_400,
    ))
