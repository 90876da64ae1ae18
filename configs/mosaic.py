"""The stages of the mosaics: one tiny model per row of their tables, all of one vision tower and one alignment.

    bash launch/quickstart.sh --mosaic        # all of them, then the tables

The stage is the config's argument: `alignment`; then, which start from it, `upper_bound` (its weights, read with the
VoCo mask, are the lower bound as well), `voco_N`, and the baselines `avg_pool`, `qformer`, `llama_vid`, `downsample`
and `random`. A recipe follows after a plus sign: `voco_1+pool`; several are joined (`voco_1+pool+kl`):

* `pool`: `model.voco.init = "pool"`.
* `own`: `model.voco.rows = "own"`.
* `nested`: `model.voco.init = "pool_nested"`.
* `elastic`: `data.fewest_vocos = 1`, so that any number of the VoCo tokens may be read.
* `annealed`: the same, and the fewest goes down from all to one in the first half of the run.
* `spread`: `model.voco.places = "spread"`.
* `band`: `model.voco.sees = "band"`.
* `output`: `model.voco.reads = "output"`.
* `closing`: `closing = 0.5`, the mask closes in the first half of the steps.
* `embedding_lr`: the embeddings, the VoCo token's row among them, learn five times as fast.
* `captions`: each row also writes out all tiles in reading order.
* `kl`: distillation from the upper bound. `experiments/mosaic.py` names the teacher.
"""

import dataclasses

from ml_collections import ConfigDict

from vocojax.config import ConfigError, DecoderConfig, VisionConfig, VocoConfig, config_to_dict, preset
from vocojax.training.config import all_keys

VOCABULARY = 38  # words of the questions and captions, special tokens and <voco>
STEPS = 200


def get_config(stage: str = "voco_1") -> ConfigDict:
    """Returns the config of one of the mosaics' stages.

    Raises:
      ConfigError: there is no such stage.
    """
    model = config_to_dict(dataclasses.replace(
        preset("tiny"),
        vision=VisionConfig(image_size=64, patch_size=16, width=64, depth=2, num_heads=4, mlp_width=256,
                            select_layer=-1),
        decoder=DecoderConfig(vocab_size=VOCABULARY, width=64, depth=3, num_heads=4, num_kv_heads=4, head_width=16,
                              mlp_width=128),
        voco=VocoConfig(token_id=VOCABULARY - 1),
    ))
    config = ConfigDict(all_keys(
        name=stage,
        model=model,
        data={
            "source": "mosaic", "template": "bare", "threads_per_sample": 8, "row_length": 79, "images_per_row": 1,
            "max_targets": 18, "num_threads": 1, "keep_in_memory": True,
        },
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 1.5e-3, "warmup_share": 0.05, "b2": 0.98},
        checkpoint={"every": 10_000, "keep": 1},
        batch_size=32,
        steps=STEPS,
        dtype="float32",
        frozen_dtype="float32",
        remat="none",
        log_every=20,
    ))
    row, *recipes = stage.split("+")
    if row == "alignment":
        config.update(visibility="causal", steps=1500, init_new=["projector/.*", "decoder/.*"])
        config.optimizer.learning_rate = 3e-3
    elif row == "upper_bound":
        config.visibility = "causal"
    elif row.removeprefix("voco_").isdecimal():
        config.model.voco.num_vocos = int(row.removeprefix("voco_"))
        config.data.row_length += config.model.voco.num_vocos - 1
    elif row in ("avg_pool", "downsample", "random"):
        config.model.compressor.kind = row
        config.visibility = "causal"
        config.data.row_length -= 16  # one token in place of 16, and no VoCo token
    elif row in ("qformer", "llama_vid"):
        config.model.compressor.update(kind=row, depth=4, width=64, num_heads=4, mlp_width=256)
        config.data.row_length -= 16
        config.update(visibility="causal", init_new=["compressor/.*"],
                      learning_rates=[("compressor/.*", 1.0), *config.learning_rates])
        if row == "llama_vid":  # each question has an image of its own, which is compressed for it
            config.model.compressor.update(num_tokens=2, num_queries=8, question_tokens=12)
            config.data.update(threads_per_sample=1, images_per_row=8, row_length=96, keep_in_memory=False)
    else:
        raise ConfigError("stage", f"{stage!r} is unknown: alignment, upper_bound, voco_N, avg_pool, qformer, "
                          "llama_vid, downsample or random, with +pool or +kl")
    for recipe in recipes:
        if recipe == "pool":
            config.model.voco.init = "pool"
        elif recipe == "own":
            config.model.voco.rows = "own"
            config.init_new = (*config.init_new, "decoder/voco_offsets")
        elif recipe == "nested":
            config.model.voco.init = "pool_nested"
        elif recipe == "elastic":
            config.data.fewest_vocos = 1
        elif recipe == "annealed":
            config.data.update(fewest_vocos=1, anneal_samples=config.batch_size * config.steps // 2)
        elif recipe == "spread":
            config.model.voco.places = "spread"
        elif recipe == "band":
            config.model.voco.sees = "band"
        elif recipe == "output":
            config.model.voco.reads = "output"
            config.plan = "two_stage"
            config.data.row_length = 60  # of text alone
        elif recipe == "closing":
            config.closing = 0.5
        elif recipe == "captions":
            config.data.source = "mosaic_captions"
            config.data.row_length += 12
            config.data.max_targets += 9
        elif recipe == "embedding_lr":
            config.learning_rates = [("decoder/embedding", 5.0), *config.learning_rates]
        elif recipe != "kl":
            raise ConfigError("stage", f"{stage!r} names the unknown recipe {recipe!r}: pool, own, nested, "
                              "elastic, annealed, spread, band, output, closing, kl, captions or embedding_lr")
    return config
