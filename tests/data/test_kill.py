"""A process that is killed without warning: the stream goes on from its last saved state with the same batches."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from vocojax.config import build, config_to_dict
from vocojax.data.config import DataConfig
from vocojax.data.loader import BatchStream

ROOT = Path(__file__).parent.parent.parent
TAKE = """
import json, sys
from tests.data.test_kill import BatchStream, DataConfig, build, digest
from vocojax.config import ModelConfig

if __name__ == "__main__":
    model, data, first, state = json.loads(sys.argv[1])
    stream = BatchStream(build(ModelConfig, model), build(DataConfig, data), 4, 7, "voco", "causal")
    if state:
        stream.set_state(state)
    for step in range(first, 14):
        print(json.dumps({"step": step, "digest": digest(next(stream)), "state": stream.get_state()}), flush=True)
        if not state:
            sys.stdin.readline()
"""


def digest(batch):
    return hashlib.sha256(b"".join(key.encode() + batch[key].tobytes() for key in sorted(batch))).hexdigest()


def test_a_killed_stream_goes_on_with_the_same_batches_bit_for_bit(tiny_config, llava_data):
    data = {"path": str(llava_data / "records.json"), "image_root": str(llava_data / "images"), "pack_window": 5,
            "tokenizer": str(llava_data / "tokenizer"), "template": "short", "row_length": 40, "images_per_row": 2,
            "num_threads": 2}

    def run(first, state, kill_at=None):
        argument = json.dumps([config_to_dict(tiny_config), data, first, state])
        process = subprocess.Popen(
            [sys.executable, "-c", TAKE, argument], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)})
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if lines[-1]["step"] == kill_at:
                process.send_signal(signal.SIGKILL)
                break
            if not state:
                process.stdin.write("\n")
                process.stdin.flush()
        return lines, process.wait()

    stream = BatchStream(tiny_config, build(DataConfig, data), 4, 7, "voco", "causal")
    whole = [{"step": step, "digest": digest(next(stream)), "state": stream.get_state()} for step in range(14)]
    assert len({line["digest"] for line in whole}) > 10
    before, killed = run(0, None, kill_at=6)
    assert killed == -signal.SIGKILL and before == whole[:7]
    saved = before[3]  # three more batches were taken since
    behind, done = run(4, saved["state"])
    assert done == 0 and behind == whole[4:]
