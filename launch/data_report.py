"""What the data pipeline costs on this machine, beside PIL and transformers' CLIP processor in a torch DataLoader.

    python launch/data_report.py --json report.json          (minutes; needs the extra `test` for the comparison)
"""

import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from absl import app, flags
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vocojax.cli.terminal import show_own_messages
from vocojax.costs import data
from vocojax.data.conversation import conversation_from_llava, template
from vocojax.data.images import MEAN_COLOUR
from vocojax.data.tokenizer import Tokenizer

JSON = flags.DEFINE_string("json", None, "Where to write the figures.")
IMAGES = flags.DEFINE_integer("images", 120, "Images per measurement.")
RECORDS = flags.DEFINE_integer("records", 665_000, "Records of the large JSON.")
REPEATS = 5


def torch_rate(folder: Path, images: int):
    """The same work as LLaVA's code does it: images per second of CPU time; no worker process, so nothing is copied."""
    import torch
    from transformers import CLIPImageProcessor

    torch.set_num_threads(1)
    records = [r for r in json.loads((folder / "records.json").read_text()) if "image" in r][:images]
    processor, spans = CLIPImageProcessor.from_dict({"size": {"shortest_edge": 336}, "crop_size": 336}), template(
        "vicuna_v1").spans
    tokenizer = Tokenizer.from_directory(folder / "tokenizer")

    class Records(torch.utils.data.Dataset):
        def __len__(self):
            return len(records)

        def __getitem__(self, index):
            image = Image.open(folder / "images" / records[index]["image"]).convert("RGB")
            square = Image.new("RGB", (max(image.size),) * 2, MEAN_COLOUR)
            square.paste(image, tuple((max(image.size) - edge) // 2 for edge in image.size))
            conversation = conversation_from_llava("", records[index]["conversations"])
            text = "".join(span.text for span in spans(conversation, tokenizer.eos_token))
            return processor(square, return_tensors="pt")["pixel_values"][0], len(tokenizer.encode(text).ids)

    def measure() -> float:
        before = time.process_time()
        taken = sum(len(batch) for batch, _ in torch.utils.data.DataLoader(Records(), batch_size=16))
        return taken / (time.process_time() - before)

    return measure


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    show_own_messages()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = data.write_images(folder / "images", 60)
        data.write_records(folder / "records.json", 600, images, 200)
        ours, theirs = data.stream_rate(folder, IMAGES.value), torch_rate(folder, IMAGES.value)
        rates = [(ours(), theirs()) for _ in range(REPEATS + 1)][1:]  # interleaved; the first pair warms up
        medians = {who: statistics.median(values) for who, values in zip(("vocojax", "torch_dataloader"),
                                                                         zip(*rates, strict=True), strict=True)}
        data.write_records(folder / "records.json", RECORDS.value, images, 240)
        size = (folder / "records.json").stat().st_size
        (building, _), (seconds, gib) = data.first_batch(folder), data.first_batch(folder)
    figures = {
        "images_per_second_per_core": medians, "speedup": medians["vocojax"] / medians["torch_dataloader"],
        "fill_ratio": data.fill_ratio(2000), "first_batch_seconds_665k": seconds, "resident_gib_665k": gib,
        "first_batch_seconds_665k_building_the_file": building, "records": RECORDS.value, "json_gib": size / 2**30,
    }
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"images/s per core, JPEG file to packed batch     {medians['vocojax']:8.1f}")
    print(f"  PIL + CLIP processor in a torch DataLoader     {medians['torch_dataloader']:8.1f}")
    print(f"  ratio                                          {figures['speedup']:8.2f}")
    print(f"row fill at 2,048 tokens                         {figures['fill_ratio']:8.1%}")
    print(f"first batch, {RECORDS.value:,} records in {size / 2**30:.2f} GiB    {seconds:8.1f} s")
    print(f"  when the columnar file is made first           {building:8.1f} s")
    print(f"peak resident memory of that process             {gib:8.2f} GiB")


if __name__ == "__main__":
    app.run(main)
