"""Stage 2 of configs/voco.py by the recipe that does best on the mosaics (docs/science.md): eight pooled VoCo tokens.

    python launch/train.py --config=configs/voco_7b_best.py --workdir=runs/voco_7b_best \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/alignment

`voco.init = "pool"` begins each VoCo token as the mean of its window of the image. It adds no parameter. Everything
else is the paper's stage: rates, rows, batch and steps are those of configs/voco.py, where they are explained. What it
costs beside plain VoCo, without a device:

    . launch/xla_flags.sh v5e
    python launch/compile_report.py --config=configs/voco_7b_best.py --topology=v5e:16x16 --config.batch_size=256
    python launch/compile_report.py --config=configs/voco.py --config.model.voco.num_vocos=8 --topology=v5e:16x16 \
        --config.batch_size=256

Another model is chosen as for configs/voco.py, another number of VoCo tokens by --config.model.voco.num_vocos.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(model: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    values = config_to_dict(preset(model))
    values["voco"].update(num_vocos=8, init="pool")
    return ConfigDict(all_keys(
        name="voco_7b_best",
        model=values,
        data={"template": "vicuna_v1", "row_length": 2048, "images_per_row": 3},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 2e-5, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=64,
        steps=10_400,
    ))
