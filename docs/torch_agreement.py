"""Compares the answers of a PyTorch export with vocojax's: each asked about its own cache of the same images.

    python launch/convert.py --source=runs/quickstart/seed_0/voco_1 --target=export --target_layout=huggingface
    python docs/torch_agreement.py runs/quickstart/seed_0/voco_1 export agreement.json

It takes a minute, and needs the extras `quickstart` and `test`.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vocojax
from vocojax.data.sources.easy_vqa import EasyVqaSource

IMAGES, QUESTIONS = 20, 3  # easy-VQA's first test images, and the first questions about each


def main(run: str, export: str, output: str) -> None:
    """Asks both and writes `{"questions", "identical_answers"}`."""
    source = EasyVqaSource("test")
    assistant = vocojax.load(run)
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True)
    same = asked = 0
    for image, questions in list(zip(source.images, source.questions, strict=True))[:IMAGES]:
        texts = [question.text for question in questions[:QUESTIONS]]
        ours = assistant.read(assistant.compress(image), texts)
        with torch.no_grad():
            cache = model.compress(processor(images=str(image))["pixel_values"])
            for text, answer in zip(texts, ours, strict=True):
                turn = [{"role": "user", "content": text}]
                inputs = processor.apply_chat_template(turn, tokenize=True, voco_cache=cache)
                ids = model.generate(**inputs, voco_cache=cache, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
                (theirs,) = processor.batch_decode(ids, skip_special_tokens=True)
                same, asked = same + (theirs.strip() == answer), asked + 1
    Path(output).write_text(json.dumps({"questions": asked, "identical_answers": same}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
