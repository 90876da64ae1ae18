"""Stage 1: the projector learns to speak the decoder's language, on captions.

    python launch/train.py --config=configs/alignment.py --workdir=runs/alignment \
        --config.data.path=blip_laion_cc_sbu_558k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/vicuna-7b-clip-l-336

The learning rate, warm-up and epoch are LLaVA-1.5's. Its batch is 256 images; a row packs up to eight of them, so 32
rows are a batch here, and 2,180 steps one epoch of 558,000 images. `init_from` is a run directory with the pretrained
tower and decoder, which launch/convert.py makes; the projector is new.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(preset_name: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    return ConfigDict(all_keys(
        name="alignment",
        model=config_to_dict(preset(preset_name)),
        data={"template": "plain", "row_length": 5120, "images_per_row": 8},
        learning_rates=[("projector/.*", 1.0), ("vision/.*", "freeze"), ("decoder/.*", "freeze")],
        init_new=["projector/.*"],
        visibility="causal",
        optimizer={"learning_rate": 1e-3},
        batch_size=32,
        steps=2180,
    ))
