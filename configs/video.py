"""Stage 3: the model of a voco stage learns time on compressed frames (paper §3.4), on videos' captions and questions.

    python launch/train.py --config=configs/video.py --workdir=runs/video_2 --config.model.voco.num_vocos=2 \
        --config.init_from=runs/voco_2 --config.data.tokenizer=vicuna-7b-v1.5

With eight VoCo tokens per frame, start from a voco stage of eight. Another model of `vocojax.config.PRESETS`, here at
224 px; the voco stage must have the same model:

    python launch/train.py --config=configs/video.py:clip_l_224_vicuna_7b --workdir=runs/video_224_8 \
        --config.model.voco.num_vocos=8 --config.init_from=runs/voco_224_8 --config.data.tokenizer=vicuna-7b-v1.5

The data is `SOURCES` below: files and folders of these names in the current directory. Others are given as
`--config.data.mixture='[{"source": "webvid", "path": "a.csv", "image_root": "clips"}]'`, all sources at once.

Frames are taken once per second, `data.frames` of them at most; longer videos are sampled evenly. Every frame is a
unit. Units run alone (`plan="two_stage"`), so memory hardly depends on the number of frames, as
launch/compile_report.py --frames shows (docs/video.md has a table). Positions are compact;
`--config.model.voco.positions=sequential` numbers all tokens.

What trains: the projector and the decoder, as in the voco stage. The vision tower is frozen. The paper names the data,
and 2 and 8 VoCo tokens at 224 and 336 px (Table 8). It does not give the hyper-parameters of this stage. These are
ours: the learning rate and warm-up of configs/voco.py, 128 frames at most, 32 rows of up to 128 frames and 1,024 tokens
of text, equal weights of both sources, and 4,000 steps.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys

SOURCES = (
    {"source": "webvid", "path": "webvid.csv", "image_root": "webvid"},
    {"source": "video_chatgpt", "path": "video_chatgpt.json", "image_root": "activitynet"},
)


def get_config(model: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    values = config_to_dict(preset(model))
    values["voco"]["num_vocos"] = 2
    return ConfigDict(all_keys(
        name="video",
        model=values,
        data={"mixture": SOURCES, "template": "vicuna_v1", "row_length": 1024, "images_per_row": 128,
              "frame_sampling": "fps", "frames": 128, "max_targets": 512},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        plan="two_stage",
        unit_chunk=16,
        optimizer={"learning_rate": 2e-5, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=32,
        steps=4000,
    ))
