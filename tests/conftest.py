"""What several tests need: tokenizers, a tiny model and small data on disk."""

import gc
import json
import os

from tests.helpers.environment import COMPILER_FLAGS, KEEPING_PROGRAMS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{COMPILER_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.update(KEEPING_PROGRAMS)  # before JAX is imported; processes that tests start inherit them

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from transformers import LlamaTokenizer

from vocojax import testing
from vocojax.config import ModelConfig
from vocojax.data.config import DataConfig
from vocojax.data.tokenizer import Tokenizer
from vocojax.models.voco import VocoLlama
from vocojax.training.config import CheckpointConfig, OptimizerConfig, StageConfig

# Tracing makes many objects that live on: the search for cycles among them took a tenth of the tests' time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is the color of the bus? ASSISTANT: The bus is red."
]


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory) -> Tokenizer:
    """A sentencepiece BPE tokenizer with LLaMA's settings (byte fallback, dummy prefix, BOS 1, EOS 2, legacy=False)."""
    directory = tmp_path_factory.mktemp("llama_tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50), model_prefix=str(directory / "tokenizer"), vocab_size=370,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )
    return Tokenizer(LlamaTokenizer.from_pretrained(str(directory), legacy=False))


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A word tokenizer for the captions and questions of the tests' own data."""
    return testing.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_config(words) -> ModelConfig:
    return testing.tiny_config(words)


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> VocoLlama:
    return testing.tiny_model(tiny_config)


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory, words):
    """A directory with a LLaVA JSON of 12 records (one without image), their images, and the tokenizer."""
    root = tmp_path_factory.mktemp("llava")
    (root / "images").mkdir()
    random = np.random.default_rng(0)
    records = []
    for i in range(12):
        colour = ("red", "green", "blue")[i % 3]
        turns = [{"from": "human", "value": "<image>\nwhat color is the shape?"}, {"from": "gpt", "value": colour}]
        record = {"id": f"r{i}", "conversations": turns}
        if i == 11:
            turns[0]["value"] = "what color is red?"
        else:
            pixels = random.integers(0, 255, (20 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{i}.png")
            record["image"] = f"{i}.png"
        records.append(record)
    (root / "records.json").write_text(json.dumps(records))
    words.save(root / "tokenizer")
    return root


@pytest.fixture
def stage(tiny_config, llava_data) -> StageConfig:
    """A stage of four steps on the tests' own LLaVA records."""
    return StageConfig(
        name="test",
        model=tiny_config,
        data=DataConfig(
            path=str(llava_data / "records.json"), image_root=str(llava_data / "images"),
            tokenizer=str(llava_data / "tokenizer"), template="short", row_length=48, images_per_row=2, pack_window=6,
            max_targets=12, num_threads=1,
        ),
        learning_rates=(("projector/.*", 1.0), ("decoder/.*", 1.0), ("vision/.*", "freeze")),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        batch_size=4,
        steps=4,
        dtype="float32",
        frozen_dtype="float32",
        remat="none",
        log_every=2,
    )
