"""Run by the Python of an environment with torch and transformers only: prints what an export answers there, as JSON.

    python in_environment.py EXPORT IMAGE CACHE OUT    reads the cache, and writes one of its own to OUT
"""

import importlib.util
import json
import sys
import warnings

import torch
import transformers
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

directory, image, cache_file, out = sys.argv[1:]
warnings.simplefilter("ignore")
warnings.simplefilter("error", FutureWarning)  # such as of an argument that has another name by now
assert importlib.util.find_spec("jax") is None and importlib.util.find_spec("vocojax") is None
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(directory, trust_remote_code=True)).__name__ == type(model).__name__
cache = model.load_cache(cache_file)
model.compress(processor(images=image)["pixel_values"]).save(out)
found = {"transformers": transformers.__version__}
for name, content in (("whole", [{"type": "image", "path": image}]), ("cached", [])):
    text = {"type": "text", "text": "what color is the shape?"}
    after = {} if content else {"voco_cache": cache}
    message = {"role": "user", "content": [*content, text]}
    inputs = processor.apply_chat_template([[message]] * 2, tokenize=True, **after)
    with torch.no_grad():
        found[name] = model(**inputs, **after).logits[0, -1].tolist()
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        answers = model.generate(**inputs, **after, **settings, max_new_tokens=4, do_sample=False, pad_token_id=0)
        if "num_beams" not in settings:
            tokens = answers[:, inputs["input_ids"].shape[1] :].tolist()
            assert found.setdefault(f"{name} tokens", tokens) == tokens, settings
model.save_pretrained(f"{out}_model")
processor.save_pretrained(f"{out}_model")
again = AutoModelForImageTextToText.from_pretrained(f"{out}_model", trust_remote_code=True)
assert again.fingerprint() == model.fingerprint()
print(json.dumps(found))
