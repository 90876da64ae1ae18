"""Costs of the input pipeline, measured on synthetic records; `vocojax data_report` prints them."""

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vocojax.config import ModelConfig, VisionConfig, VocoConfig, preset
from vocojax.costs.rows import typical_rows
from vocojax.data.config import DataConfig
from vocojax.data.loader import BatchStream
from vocojax.data.tokenizer import word_tokenizer
from vocojax.errors import InputError

WORDS = ("a", "photo", "of", "the", "bus", "dog", "tree", "red", "small", "person", "near", "left", "what", "how", "is")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PIXELS = ((640, 480), (480, 640), (640, 427), (500, 375), (1024, 768))  # sizes like COCO's and OCR-VQA's


def write_images(folder: Path, count: int) -> list[str]:
    """Writes noisy pictures as JPEG files of ordinary size and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        width, height = PIXELS[index % len(PIXELS)]
        y, x = np.mgrid[:height, :width] / 17
        waves = np.stack([np.sin(x * (c + 1) + y * (2 - c) + index) for c in range(3)], -1)
        pixels = 127 + 100 * waves + random.normal(0, 8, waves.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg", quality=90)
    return [f"{index}.jpg" for index in range(count)]


def own_images(folder: Path, root: str | Path) -> list[str]:
    """Makes a folder of images from a directory, by a link, and returns their names.

    Raises:
      InputError: the directory has no image.
    """
    names = sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise InputError(f"{root}: there is no image in this directory ({', '.join(SUFFIXES)})")
    folder.symlink_to(Path(root).resolve())
    return names


def write_records(path: Path, count: int, images: Sequence[str], words: int) -> None:
    """Writes a LLaVA JSON of `count` records with about `words` words each; every 16th has no image."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, words // 6)) for _ in range(1000)]
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            picks = random.integers(0, len(texts), 6).tolist()
            values = [texts[pick] for pick in picks]
            record: dict[str, Any] = {"id": f"{index:012d}"}
            if index % 16:
                record["image"], values[0] = images[index % len(images)], "<image>\n" + values[0]
            record["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
            file.write(("[" if not index else ",\n") + json.dumps(record))
        file.write("]")


def stage(folder: Path) -> tuple[ModelConfig, DataConfig]:
    """Returns the configs of a 7B stage on the data in a folder (`records.json`, `images`), with a word tokenizer.

    It has one thread per core: more of them would push each other's pixels out of the caches.
    """
    tokenizer = word_tokenizer([" ".join(WORDS) + " USER: ASSISTANT: "])
    tokenizer.save(folder / "tokenizer")
    model = preset("clip_l_336_vicuna_7b")
    model = ModelConfig(VisionConfig(), model.projector, model.decoder, VocoConfig(token_id=tokenizer.voco_id))
    return model, DataConfig(path=str(folder / "records.json"), image_root=str(folder / "images"),
                             tokenizer=str(folder / "tokenizer"), images_per_row=3, num_threads=os.cpu_count() or 1)


def stream_rate(folder: Path, images: int) -> Callable[[], float]:
    """Returns a function that takes batches with about `images` images and returns images per second of CPU time."""
    stream = BatchStream(*stage(folder), 8, 0, "voco")
    next(stream)  # compiles, fills the windows
    _settled()

    def measure() -> float:
        taken, before = 0, _settled()
        while taken < images:
            taken += int((next(stream)["vision"] >= 0).sum()) // 576
        return taken / (_settled() - before)

    return measure


def _settled() -> float:
    """Waits until the batches made ahead are complete. Returns the CPU seconds of this process."""
    last = time.process_time()
    while True:
        time.sleep(0.3)
        now = time.process_time()
        if now - last < 0.01:
            return now
        last = now


def fill_ratio(rows: int) -> float:
    """Returns the share of typical rows' tokens that are no padding, at the default row length and window."""
    length = DataConfig.row_length
    return typical_rows(rows, length).tokens / length


def first_batch(folder: Path, rows: int = 8) -> tuple[float, float]:
    """Measures the seconds from opening the data to the first batch, and the peak resident GiB, in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_first_batch, folder, rows).result()


def _first_batch(folder: Path, rows: int) -> tuple[float, float]:
    model, data = stage(folder)
    before = time.perf_counter()
    stream = BatchStream(model, data, rows, 0, "voco")
    next(stream)
    seconds = time.perf_counter() - before
    stream.close()
    return seconds, _peak_resident_gib()


def _peak_resident_gib() -> float:
    """Returns the peak of this process; `getrusage` would give the parent's if that is larger."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20  # type: ignore[index]
