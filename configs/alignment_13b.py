"""Stage 1 of the 13B on a pod: the projector learns to speak the decoder's language, on captions.

    . launch/xla_flags.sh v5p
    python launch/train.py --config=configs/alignment_13b.py --workdir=gs://bucket/runs/alignment_13b \
        --config.data.path=blip_laion_cc_sbu_558k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-13b-v1.5 --config.init_from=gs://bucket/runs/pretrained_13b

LLaVA-1.5's learning rate 1e-3, batch of 256 images (128 rows of two) and one epoch of 558,000. `init_from` is a run
directory with the pretrained tower and decoder, which launch/convert.py makes; the projector is new.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(preset_name: str = "clip_l_336_vicuna_13b") -> ConfigDict:
    return ConfigDict(all_keys(
        name="alignment_13b",
        model=config_to_dict(preset(preset_name)),
        data={"template": "plain", "row_length": 1280, "images_per_row": 2},
        learning_rates=[("projector/.*", 1.0), ("vision/.*", "freeze"), ("decoder/.*", "freeze")],
        init_new=["projector/.*"],
        visibility="causal",
        optimizer={"learning_rate": 1e-3, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=128,
        steps=2180,
    ))
