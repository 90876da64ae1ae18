"""A 7B model goes through the converter in a fraction of its size in memory."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.helpers import checkpoints
from vocojax.config import preset
from vocojax.convert import huggingface, tables
from vocojax.convert.safetensors_files import SafetensorsWriter
from vocojax.pretrained.source import parameter_shapes

GIB = 2**30
LIMIT = 6 * GIB
ROWS = 32064  # LLaVA-1.5's vocabulary in transformers' layout
ROOT = Path(__file__).parents[2]

# Runs the command line and reports its own peak of resident memory.
MEASURED = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
  runpy.run_path(sys.argv[0], run_name='__main__')
finally:
  print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
"""


def write_seven_billion(directory: Path) -> int:
    """A LLaVA-1.5-7B in transformers' layout with random finite bf16 values, in three shards; returns its bytes."""
    config = preset("clip_l_336_vicuna_7b")
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=ROWS, vocab_padding=0))
    slots = tables.huggingface_table(config, ROWS).resolve(parameter_shapes(config))
    bits = np.random.default_rng(0).integers(0, 2**16, 2**26, np.uint16)
    values = (bits & 0xBFFF).view(ml_dtypes.bfloat16)  # exponents below 128: no infinities and no NaNs
    names, homes = list(slots), {}
    directory.mkdir()
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        part = names[shard::3]
        homes |= dict.fromkeys(part, file)
        bf16 = values.dtype
        with SafetensorsWriter(directory / file, {name: (bf16, slots[name].shape) for name in part}) as writer:
            for number, name in enumerate(part):
                size = int(np.prod(slots[name].shape))
                start = number * 9973 % 2**20
                writer.write(name, np.resize(values[start:], size).reshape(slots[name].shape))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values_json = huggingface.write_llava(config, ROWS, ids, image_id=checkpoints.WORDS)
    (directory / "config.json").write_text(json.dumps(values_json))
    checkpoints.save_tokenizer(directory, "<image>", "<voco>")
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def convert_measured(*arguments) -> tuple[int, str]:
    """Peak resident bytes of launch/convert.py, and what it printed."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(ROOT / "launch" / "convert.py"), *map(str, arguments)],
                          capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.rsplit("peak ", 1)[1]), done.stdout


@pytest.mark.slow
def test_seven_billion_in_six_gigabytes(tmp_path):
    if shutil.disk_usage(tmp_path).free < 48 * 10**9:
        pytest.skip("needs 48 GB of disk")
    try:
        assert 14.1e9 < write_seven_billion(tmp_path / "hf") < 14.3e9
        into, report = convert_measured("--source", tmp_path / "hf", "--target", tmp_path / "run", "--target_layout",
                                        "orbax", "--verify")
        deltas = [line for line in report.splitlines() if "|Δ|" in line]
        assert len(deltas) == 55 and all(line.endswith("|Δ| 0") for line in deltas)
        shutil.rmtree(tmp_path / "hf")
        out, _ = convert_measured("--source", tmp_path / "run", "--target", tmp_path / "original", "--target_layout",
                                  "llava")
        shards = sorted(path.stat().st_size for path in (tmp_path / "original").glob("*.safetensors"))
        assert len(shards) == 3 and shards[-1] <= 5 * 10**9 + 10**5
        print(f"peak resident memory: into Orbax {into / GIB:.2f} GiB, out of it {out / GIB:.2f} GiB")
        assert max(into, out) < LIMIT
    finally:
        for name in ("hf", "run", "original"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
