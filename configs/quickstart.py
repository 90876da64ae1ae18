"""The quickstart's stages on easy-VQA: one tiny model per row of the retention table.

    bash launch/quickstart.sh                 # all of them, then the table

A single one, after the quickstart's first stages:

    python launch/train.py --config=configs/quickstart.py:voco_4 --config.model.voco.num_vocos=4 \
        --config.init_from=runs/quickstart/seed_0/alignment --config.data.tokenizer=runs/quickstart/tokenizer \
        --workdir=runs/voco_4

The stage is the config's argument: `alignment`; then, which start from it, `upper_bound` (its weights, read with the
VoCo mask, are the lower bound as well), `voco_N`, and the baselines `avg_pool`, `qformer`, `llama_vid`, `downsample`
and `random`. `voco_N+own` is ours: `model.voco.rows = "own"`, without which more VoCo tokens are worse here.
"""

import dataclasses

from ml_collections import ConfigDict

from vocojax.config import ConfigError, config_to_dict, preset
from vocojax.training.config import all_keys

VOCABULARY = 34  # words of the training questions, special tokens and <voco>


def get_config(stage: str = "voco_1") -> ConfigDict:
    """Returns the config of one of the quickstart's stages.

    Raises:
      ConfigError: there is no such stage.
    """
    tiny = preset("tiny")
    model = config_to_dict(dataclasses.replace(
        tiny, decoder=dataclasses.replace(tiny.decoder, vocab_size=VOCABULARY),
        voco=dataclasses.replace(tiny.voco, token_id=VOCABULARY - 1),
    ))
    config = ConfigDict(all_keys(
        name=stage,
        model=model,
        data={
            "source": "easy_vqa", "template": "bare", "threads_per_sample": 4, "row_length": 68, "images_per_row": 1,
            "max_targets": 8, "num_threads": 2, "keep_in_memory": True,
        },
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 2e-3, "warmup_share": 0.05, "b2": 0.98},
        checkpoint={"every": 10_000, "keep": 1},
        batch_size=40,
        steps=800,
        dtype="float32",  # faster than bfloat16 on a CPU without bf16 instructions
        frozen_dtype="float32",
        remat="none",
        log_every=20,
    ))
    if stage == "alignment":
        # The decoder is not pretrained, so there is no language to align to yet: it learns the captions as well.
        config.data.update(source="easy_vqa_captions", template="plain", row_length=48, images_per_row=2)
        config.update(visibility="causal", steps=300, init_new=["projector/.*", "decoder/.*"], batch_size=32)
    elif stage == "upper_bound":
        config.visibility = "causal"
    elif stage.removeprefix("voco_").removesuffix("+own").isdecimal():
        config.model.voco.num_vocos = int(stage.removeprefix("voco_").removesuffix("+own"))
        config.data.row_length += config.model.voco.num_vocos - 1
        if stage.endswith("+own"):
            config.model.voco.rows = "own"
            config.init_new = ("decoder/voco_offsets",)
    elif stage in ("avg_pool", "downsample", "random"):
        config.model.compressor.kind = stage
        config.visibility = "causal"
    elif stage in ("qformer", "llama_vid"):
        config.model.compressor.update(kind=stage, depth=4, width=64, num_heads=4, mlp_width=256)
        config.update(visibility="causal", init_new=["compressor/.*"],
                      learning_rates=[("compressor/.*", 1.0), *config.learning_rates])
        if stage == "llama_vid":  # each question has an image of its own, which is compressed for it
            config.model.compressor.update(num_tokens=2, num_queries=8, question_tokens=12)
            config.data.update(threads_per_sample=1, images_per_row=4, keep_in_memory=False)
            config.batch_size = 35  # as many questions as the other stages' 40 rows
    else:
        raise ConfigError("stage", f"{stage!r} is unknown: alignment, upper_bound, voco_N, voco_N+own, avg_pool, "
                          "qformer, llama_vid, downsample or random")
    return config
