"""Stage 2: projector and decoder learn to compress every image into VoCo tokens, on instructions.

    python launch/train.py --config=configs/voco.py --workdir=runs/voco_2 --config.model.voco.num_vocos=2 \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/alignment

Hyper-parameters are the paper's. For the upper bound add --config.visibility=causal.
"""

from ml_collections import ConfigDict

from vocojax.config import preset
from vocojax.training.config import config_to_dict


def get_config(preset_name: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    return ConfigDict({
        "name": "voco",
        "model": config_to_dict(preset(preset_name)),
        "data": {
            "source": "llava",
            "path": "",
            "image_root": "",
            "tokenizer": "",
            "template": "vicuna_v1",
            "row_length": 2048,
            "images_per_row": 3,
            "max_targets": 1024,
        },
        "train": ["projector/.*", "decoder/.*"],
        "freeze": ["vision/.*"],
        "init_from": "",
        "init_new": [],
        "visibility": "voco",
        "optimizer": {"learning_rate": 2e-5, "warmup_share": 0.03},
        "batch_size": 128,
        "accumulate": 1,
        "steps": 5197,
        "seed": 0,
    })
