"""Reports what the data pipeline costs on this machine.

    vocojax data_report --json=report.json
    vocojax data_report --image_root=images

It reads synthetic images of COCO's sizes, or those of --image_root. Where torch is installed (pip install -e '.[test]')
the same work by PIL and transformers' CLIP processor in a torch DataLoader is measured for comparison. Takes minutes;
most of them are for the large JSON file, which --records makes smaller.
"""

import importlib.util
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from vocojax.cli.flag_checks import refuse_arguments, refuse_empty, require_writable

FLAGS = flags.FLAGS
REPEATS = 5


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("json", None, "File to write the figures to.")
    flags.DEFINE_string("image_root", None, "Directory of images to read; default: synthetic ones.")
    flags.DEFINE_integer("images", 120, "Images per measurement.", lower_bound=1)
    flags.DEFINE_integer("records", 665_000, "Records of the large JSON file.", lower_bound=1)
    refuse_empty("image_root")
    require_writable("json")


def main(arguments: Sequence[str]) -> None:
    """Reports."""
    refuse_arguments(arguments)
    from vocojax.costs import data

    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = data.own_images(folder / "images", FLAGS.image_root) if FLAGS.image_root else data.write_images(
            folder / "images", 60)
        data.write_records(folder / "records.json", 600, images, 200)
        measures = {"vocojax": data.stream_rate(folder, FLAGS.images)}
        if importlib.util.find_spec("torch"):
            measures["torch_dataloader"] = torch_rate(folder, FLAGS.images)
        # Measured in turn; the first round warms up.
        rates = [{who: measure() for who, measure in measures.items()} for _ in range(REPEATS + 1)][1:]
        medians = {who: statistics.median(each[who] for each in rates) for who in measures}
        data.write_records(folder / "records.json", FLAGS.records, images, 240)
        size = (folder / "records.json").stat().st_size
        (building, _), (seconds, gib) = data.first_batch(folder), data.first_batch(folder)
    figures = {
        "images_per_second_per_core": medians,
        "speedup": medians["vocojax"] / medians["torch_dataloader"] if "torch_dataloader" in medians else None,
        "fill_ratio": data.fill_ratio(2000), "first_batch_seconds_665k": seconds, "resident_gib_665k": gib,
        "first_batch_seconds_665k_building_the_file": building, "records": FLAGS.records, "json_gib": size / 2**30,
    }
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"images/s per core, image file to packed batch    {medians['vocojax']:8.1f}")
    if "torch_dataloader" in medians:
        print(f"  PIL + CLIP processor in a torch DataLoader     {medians['torch_dataloader']:8.1f}")
        print(f"  ratio                                          {figures['speedup']:8.2f}")
    else:
        print("  no comparison: torch is not installed; pip install -e '.[test]'")
    print(f"row fill at 2,048 tokens                         {figures['fill_ratio']:8.1%}")
    print(f"first batch, {FLAGS.records:,} records in {size / 2**30:.2f} GiB    {seconds:8.1f} s")
    print(f"  when the columnar file is made first           {building:8.1f} s")
    print(f"peak resident memory of that process             {gib:8.2f} GiB")


def torch_rate(folder: Path, images: int) -> Callable[[], float]:
    """Returns a measurement of the same work done as LLaVA's code does it: images per second of CPU time.

    There is no worker process, so nothing is copied between processes.
    """
    import torch
    from PIL import Image
    from transformers import CLIPImageProcessor

    from vocojax.data.conversation import conversation_from_llava, template
    from vocojax.data.images import MEAN_COLOUR
    from vocojax.data.tokenizer import Tokenizer

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
