"""Stage 1: the projector learns to map vision tokens into the decoder's embeddings, on captions.

    python launch/train.py --config=configs/alignment.py --workdir=runs/alignment \
        --config.data.path=blip_laion_cc_sbu_558k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/vicuna-7b-clip-l-336

Another model of `vocojax.config.PRESETS`, here on a pod, in shorter and more rows:

    . launch/xla_flags.sh v5p
    python launch/train.py --config=configs/alignment.py:clip_l_336_vicuna_13b \
        --workdir=gs://bucket/runs/alignment_13b --config.data.path=blip_laion_cc_sbu_558k.json \
        --config.data.image_root=images --config.data.tokenizer=vicuna-13b-v1.5 \
        --config.init_from=gs://bucket/runs/pretrained_13b \
        --config.data.row_length=1280 --config.data.images_per_row=2 --config.batch_size=128

The learning rate, warm-up and epoch are LLaVA-1.5's. Its batch is 256 images. A row packs up to eight of them, so 32
rows are a batch here, and 2,180 steps are one epoch of 558,000 images. More than 32 chips need at least one row each:
128 rows of two images are the same batch. Parameters are spread over all devices. `init_from` is a run directory with
the pretrained tower and decoder, which launch/convert.py makes; the projector is new.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(model: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    return ConfigDict(all_keys(
        name="alignment",
        model=config_to_dict(preset(model)),
        data={"template": "plain", "row_length": 5120, "images_per_row": 8},
        learning_rates=[("projector/.*", 1.0), ("vision/.*", "freeze"), ("decoder/.*", "freeze")],
        init_new=["projector/.*"],
        visibility="causal",
        optimizer={"learning_rate": 1e-3, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=32,
        steps=2180,
    ))
