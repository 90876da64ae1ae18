"""Stage 2: projector and decoder learn to compress every image into VoCo tokens, on instructions.

    python launch/train.py --config=configs/voco.py --workdir=runs/voco_2 --config.model.voco.num_vocos=2 \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/alignment

Another model of `vocojax.config.PRESETS`, here on a pod, in larger batches:

    . launch/xla_flags.sh v5p
    python launch/train.py --config=configs/voco.py:clip_l_336_vicuna_13b --workdir=gs://bucket/runs/voco_13b \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-13b-v1.5 --config.init_from=gs://bucket/runs/alignment_13b \
        --config.batch_size=128 --config.steps=5200

The learning rate (2e-5, a cosine after 3 % of warm-up), no weight decay and the row length of 2,048 tokens are the
released code's. Its batch is 128 samples. A row packs about two, so 64 rows are a batch here, and 10,400 steps are
about two epochs of 665,000 samples. More than 64 chips need at least one row each: 128 rows with 5,200 steps are as
many epochs. Parameters are spread over all devices; where launch/compile_report.py says that a batch does not fit,
raise `--config.accumulate`.

For the upper bound add --config.visibility=causal; for the KL to one (paper Eq. 1), add
--config.distill.teacher=runs/upper_bound. The vision tower trains as well, at a tenth of the rate, with
--config.learning_rates='[["vision/.*", 0.1], [".*", 1.0]]'.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(model: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    return ConfigDict(all_keys(
        name="voco",
        model=config_to_dict(preset(model)),
        data={"template": "vicuna_v1", "row_length": 2048, "images_per_row": 3},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 2e-5, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=64,
        steps=10_400,
    ))
