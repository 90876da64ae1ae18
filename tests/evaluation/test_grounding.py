"""The grounding stage end to end: Shikra's files in, a tiny model trained on them, boxes scored by the registry."""

import json

import numpy as np
import pytest
from PIL import Image

from configs.grounding import get_config
from vocojax.config import config_to_dict
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.running import Asking, answer_benchmark
from vocojax.inference.assistant import Assistant
from vocojax.training.config import stage_config
from vocojax.training.stage import train

BOXES = {"the left one": [0, 0, 40, 50], "the right one": [60, 0, 100, 50]}  # of an image of 100 x 50 pixels


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shikra's files: two expressions about each of four images; the file of the benchmark has the same form."""
    root = tmp_path_factory.mktemp("data")
    (root / "train2014").mkdir()
    records = []
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (50, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"train2014/{number}.jpg")
        records += [{"img_path": f"{number}.jpg", "expression": expression, "bbox": box, "width": 100, "height": 50}
                    for expression, box in BOXES.items()]
    points = [{"file_path": f"{number}.jpg", "question": "what is this?", "answer": "noise", "bbox": [0, 0, 9, 9],
               "point": [50, 25]} for number in range(4)]
    (root / "shikra").mkdir()
    for name, lines in (("REC_ref3_train", records), ("REC_refcoco_unc_val", records), ("pointQA_local_train", points)):
        (root / f"shikra/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.mark.slow
def test_a_model_learns_boxes_on_the_padded_square(root, tiny_config, llama_tokenizer, tmp_path):
    llama_tokenizer.save(tmp_path / "tokenizer")
    config = get_config()
    model = config_to_dict(tiny_config)
    model["decoder"].update(vocab_size=len(llama_tokenizer), width=64, num_heads=2, head_width=32, mlp_width=128)
    model["voco"].update(num_vocos=1, token_id=llama_tokenizer.voco_id)
    sources = [{"source": f"shikra_{task}", "path": str(root / f"shikra/{name}.jsonl"),
                "image_root": str(root / "train2014")}
               for task, name in (("rec", "REC_ref3_train"), ("reg", "REC_ref3_train"),
                                  ("pointqa", "pointQA_local_train"))]
    config.update(model=model, batch_size=2, steps=80, dtype="float32", frozen_dtype="float32", remat="none",
                  learning_rates=[(".*", 1.0)], init_new=[".*"], mesh={"data": 1, "fsdp": 1})
    config.optimizer.update(learning_rate=1e-2, b2=0.98)
    config.data.update(mixture=sources, template="short", row_length=360, max_targets=128, num_threads=1,
                       tokenizer=str(tmp_path / "tokenizer"))
    stage = stage_config(config)
    train(stage, tmp_path / "run")

    benchmark = open_benchmark("refcoco_val", root)
    texts = answer_benchmark(Assistant.from_run(tmp_path / "run"), benchmark, tmp_path / "answers", Asking("tiny"))
    result = benchmark.score(texts)
    # 100 x 50 pixels are padded by 25 above: the left box is [0, 25, 40, 75] of 100.
    assert texts[0] == "Answer: [0.000,0.250,0.400,0.750] ."
    assert (result.metrics["accuracy"], result.metrics["mean IoU"], result.unreadable) == (100.0, 100.0, 0)
    assert benchmark.score([*texts[:-1], "Answer: left"]).unreadable == 1
