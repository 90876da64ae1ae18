"""The 7B's video stage in a fixed shape, for `launch/compile_report.py`: N = 2 at 336 px, one row of text per chip.

    . launch/xla_flags.sh v5p
    python launch/compile_report.py --config=configs/video_7b.py --frames=8,64,512,2048 --topology=v5p:2x2x1

`--frames` sets the frames of every row, for both plans. The same shape runs on chips that are there, to be timed:

    python launch/train.py --config=configs/video_7b.py --workdir=runs/video_7b --config.data.path=video_chatgpt.json \
        --config.data.image_root=activitynet --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/voco_2

Stages to train are configs/video.py's.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(model: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    values = config_to_dict(preset(model))
    values["voco"]["num_vocos"] = 2
    return ConfigDict(all_keys(
        name="video",
        model=values,
        data={"source": "video_chatgpt", "template": "vicuna_v1", "row_length": 512, "images_per_row": 8, "frames": 8,
              "max_targets": 256},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        optimizer={"learning_rate": 2e-5, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        plan="two_stage",
        unit_chunk=8,
        batch_size=4,
        steps=1000,
    ))
