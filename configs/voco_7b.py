"""Stage 2 of the 7B on a pod: projector and decoder learn to compress every image into VoCo tokens.

    . launch/xla_flags.sh v5p
    python launch/train.py --config=configs/voco_7b.py --workdir=gs://bucket/runs/voco_7b \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=gs://bucket/runs/alignment_7b

The released code's hyper-parameters: learning rate 2e-5 with a cosine behind 3 % of warm-up, no weight decay, batches
of 128, rows of 2,048 tokens, two epochs. A batch is counted in packed rows here, of about two samples each; for 128
samples say --config.batch_size=64 --config.steps=10400. Parameters are spread over all chips of a slice; raise
`accumulate` where launch/compile_report.py says that a batch does not fit.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(preset_name: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    return ConfigDict(all_keys(
        name="voco_7b",
        model=config_to_dict(preset(preset_name)),
        data={"template": "vicuna_v1", "row_length": 2048, "images_per_row": 3},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 2e-5, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=128,
        steps=5200,
    ))
