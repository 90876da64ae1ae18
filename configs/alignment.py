"""Stage 1: the projector learns to speak the decoder's language, on captions.

    python launch/train.py --config=configs/alignment.py --workdir=runs/alignment \
        --config.data.path=blip_laion_cc_sbu_558k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/vicuna-7b-clip-l-336

Hyper-parameters are LLaVA-1.5's. `init_from` is a run directory with the pretrained tower and decoder; the projector
is new.
"""

from ml_collections import ConfigDict

from vocojax.config import preset
from vocojax.training.config import config_to_dict


def get_config(preset_name: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    return ConfigDict({
        "name": "alignment",
        "model": config_to_dict(preset(preset_name)),
        "data": {
            "source": "llava",
            "path": "",
            "image_root": "",
            "tokenizer": "",
            "template": "plain",
            "row_length": 2048,
            "images_per_row": 3,
            "max_targets": 256,
        },
        "train": ["projector/.*"],
        "freeze": ["vision/.*", "decoder/.*"],
        "init_from": "",
        "init_new": ["projector/.*"],
        "visibility": "causal",
        "optimizer": {"learning_rate": 1e-3, "warmup_share": 0.03},
        "batch_size": 256,
        "accumulate": 1,
        "steps": 2180,
        "seed": 0,
    })
