"""The stages of the quickstart on clips, which learns the order of frames.

    bash launch/quickstart.sh --video         # all of them, then the table

The stage is the config's argument. `alignment` and `voco_N` are those of the quickstart, for a decoder with one more
layer and words for clips. `short_N` starts from `voco_N` and learns time on clips of 8 frames. `video_N` starts from
`short_N`: clips of 8 to 64 frames.
"""

import dataclasses

from ml_collections import ConfigDict

from vocojax.config import ConfigError, config_to_dict, preset
from vocojax.training.config import all_keys

VOCABULARY = 113  # words of the questions about images and clips, numbers, special tokens and <voco>


def get_config(stage: str = "video_2") -> ConfigDict:
    """Returns the config of a stage.

    Raises:
      ConfigError: there is no such stage.
    """
    kind, _, number = stage.partition("_")
    if stage != "alignment" and not (kind in ("voco", "short", "video") and number.isdecimal()):
        raise ConfigError("stage", f"{stage!r} is unknown: alignment, voco_N, short_N or video_N")
    tiny = preset("tiny")
    vocos = int(number or 1)
    model = config_to_dict(dataclasses.replace(
        tiny, decoder=dataclasses.replace(tiny.decoder, vocab_size=VOCABULARY, depth=4),
        voco=dataclasses.replace(tiny.voco, token_id=VOCABULARY - 1, num_vocos=vocos),
    ))
    config = ConfigDict(all_keys(
        name=stage,
        model=model,
        data={"template": "bare", "images_per_row": 1, "num_threads": 2},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        optimizer={"learning_rate": 2e-3, "warmup_share": 0.05, "b2": 0.98},
        checkpoint={"every": 10_000, "keep": 1},
        steps=300,
        dtype="float32",  # faster than bfloat16 on a CPU without bf16 instructions
        frozen_dtype="float32",
        remat="none",
        log_every=20,
    ))
    if kind == "alignment":
        # The decoder is not pretrained, so there is no language to align to yet: it learns the captions as well.
        config.data.update(source="easy_vqa_captions", template="plain", row_length=48, images_per_row=2, max_targets=8,
                           threads_per_sample=4, keep_in_memory=True)
        config.update(visibility="causal", init_new=["projector/.*", "decoder/.*"], batch_size=32)
    elif kind == "voco":
        config.data.update(source="easy_vqa", threads_per_sample=4, row_length=67 + vocos, max_targets=8,
                           keep_in_memory=True)
        config.batch_size = 40
    elif kind == "short":
        # Units are most of a step's work on a CPU, so many questions are asked about each clip.
        config.data.update(source="easy_vqa_clips", frames=8, images_per_row=8, threads_per_sample=16, row_length=224,
                           max_targets=32)
        config.update(plan="two_stage", unit_chunk=128, batch_size=16, steps=1000)
        config.optimizer.learning_rate = 2.5e-3
    else:
        config.data.update(source="easy_vqa_clips", frames=64, images_per_row=64, threads_per_sample=24,
                           row_length=672, max_targets=96)
        config.update(plan="two_stage", unit_chunk=64, batch_size=8, steps=250)
        config.optimizer.learning_rate = 1.5e-3
    return config
