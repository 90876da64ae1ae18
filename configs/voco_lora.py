"""Stage 2 with LoRA: the decoder is frozen, and factors of rank 128 are trained for its kernels; for fewer chips.

    python launch/train.py --config=configs/voco_lora.py --workdir=runs/voco_2_lora --config.model.voco.num_vocos=2 \
        --config.data.path=llava_v1_5_mix665k.json --config.data.image_root=images \
        --config.data.tokenizer=vicuna-7b-v1.5 --config.init_from=runs/alignment

Rank, alpha and both learning rates are those of LLaVA-1.5's LoRA script: 2e-4 for the factors, and a tenth of it, 2e-5,
for the projector. Rows and steps are those of configs/voco.py. The row of the <voco> token in `decoder/embedding` is
frozen like the rest of the decoder; to train it, put ("decoder/embedding", 0.1) before the decoder's "freeze".
`lora.dropout` sets that share of the elements of A's input to 0 in training, as PEFT's `lora_dropout`; LLaVA's script
has 0.05. The masks follow from the seed and the step, so a resumed run has the same. Nothing else drops anything.
Everything that reads the run (launch/convert.py, `Assistant.from_run`, the `init_from` of another stage) gets the
kernels with their factors merged. To hand the factors over as an adapter that PEFT loads:

    python launch/convert.py --source=runs/voco_2_lora --target=voco-lora --target_layout=peft --base=alignment-hf

Another model is chosen as for configs/voco.py.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys


def get_config(model: str = "clip_l_336_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    return ConfigDict(all_keys(
        name="voco_lora",
        model=config_to_dict(preset(model)),
        data={"template": "vicuna_v1", "row_length": 2048, "images_per_row": 3},
        lora={"rank": 128, "alpha": 256.0, "targets": ["decoder/blocks/.*/kernel"], "dropout": 0.0},
        learning_rates=[
            ("projector/.*", 0.1), (".*/lora/[ab]", 1.0), ("vision/.*", "freeze"), ("decoder/.*", "freeze"),
        ],
        visibility="voco",
        optimizer={"learning_rate": 2e-4, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=64,
        steps=10_400,
    ))
