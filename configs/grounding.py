"""Fine-grained tasks (paper §4): boxes of expressions (REC), expressions of boxes (REG), questions about points.

    python launch/train.py --config=configs/grounding.py --workdir=runs/grounding \
        --config.init_from=runs/alignment_224 --config.data.tokenizer=vicuna-7b-v1.5

Then the benchmarks, `reg` with Java and the extra `benchmarks`:

    python launch/evaluate.py --checkpoint=runs/grounding --benchmarks=rec,reg,pointqa --data_root=data \
        --output=results/grounding

It starts from an alignment stage of the same model, `--config=configs/alignment.py:clip_l_224_vicuna_7b`. For the upper
bound add --config.visibility=causal.

The data is `SOURCES` below: Shikra's files and their images in the folders that the benchmarks read as well, below the
current directory. Others are given as `--config.data.mixture`, all sources at once. Questions and answers are one of
Shikra's templates per task, the same in training and in the benchmarks. Boxes are shares of the image padded to a white
square (`data.fit`); with another `fit` the benchmarks' boxes would be others than those that were learned.

The paper names the tasks, the benchmarks and the model: CLIP-L/14 at 224 px, white padding as in Shikra. It does not
give this stage's hyper-parameters. The learning rate, its cosine and the 3 % of warm-up are those of Shikra (arXiv
2306.15195), which trained on batches of 64 samples. Ours are: one VoCo token, equal weights of all sources, rows of
2,048 tokens (about five samples), 16 rows in a batch, and 8,000 steps. Vision tower frozen, all else trained, as in
configs/voco.py.
"""

from ml_collections import ConfigDict

from vocojax.config import config_to_dict, preset
from vocojax.training.config import all_keys

SOURCES = (
    {"source": "shikra_rec", "path": "data/shikra/REC_ref3_train.jsonl", "image_root": "data/coco/train2014"},
    {"source": "shikra_reg", "path": "data/shikra/REC_ref3_train.jsonl", "image_root": "data/coco/train2014"},
    {"source": "shikra_pointqa", "path": "data/shikra/pointQA_local_train.jsonl", "image_root": "data/vg"},
    {"source": "shikra_pointqa", "path": "data/shikra/pointQA_twice_train.jsonl", "image_root": "data/vg"},
)


def get_config(model: str = "clip_l_224_vicuna_7b") -> ConfigDict:
    """Returns the stage's config for one of `vocojax.config.PRESETS`."""
    return ConfigDict(all_keys(
        name="grounding",
        model=config_to_dict(preset(model)),
        data={"mixture": SOURCES, "template": "vicuna_v1", "fit": "pad_white", "row_length": 2048, "images_per_row": 6,
              "max_targets": 512},
        learning_rates=[("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")],
        visibility="voco",
        optimizer={"learning_rate": 2e-5, "warmup_share": 0.03, "weight_decay": 0.0},
        mesh={"data": 1, "fsdp": -1},
        batch_size=16,
        steps=8000,
    ))
