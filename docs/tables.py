"""The origin of each stored table (`measured/NAME.json`): a command, its result file, and how its rows are read.

`measure.py` runs the commands. A table that is not listed in `TABLES` has no command that makes it again; its note says
where it comes from.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocojax.errors import VocojaxError

Rows = list[list[str]]
KINDS = ("colour", "shape", "yes/no")  # of easy-VQA's questions
QUICKSTART = {  # rows of retention.json, and how the table names them
    "Upper Bound": "Upper Bound (reads all 16 vision tokens)",
    "VoCo-1": "**VoCo-1 (one token)**",
    "Lower Bound": "Lower Bound (VoCo mask without VoCo training)",
}
MOSAIC = {"Upper Bound": "Upper Bound (16 vision tokens)",
          "Lower Bound": "Lower Bound (VoCo mask without VoCo training)"}
CLIPS = ("frame t", "first frame", "last frame", "came first", "change after t", "count", "change")
LAYOUTS = {"a": "8 packed rows of 2,048", "b": "one unit of 576 + 128 text", "c": "video, 64 × 258 + 128 text",
           "d": "causal 8,192"}
BEST = ("configs/voco.py, N = 1", "configs/voco_7b_best.py, N = 8, pooled")  # in the order of the files' names
CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1")


class NoResult(VocojaxError):
    """A table's command has not been run, or has failed."""


@dataclass(frozen=True)
class Table:
    """How a table is made again.

    Attributes:
      command: writes the result; run by bash in the checkout's directory, where `python` is the one that runs this.
      result: the file that it writes, or a pattern of several, in that directory.
      rows: reads the columns, then the rows, from the results: one for each file, in the order of their names.
      needs: what the command needs: CPU time on two idle cores, packages.
      packages: whose versions the table names.
      is_static: whether the figures come from a compiler's output, and so do not depend on this machine.
    """

    command: str
    result: str
    rows: Callable[[Sequence[Any]], Rows]
    needs: str
    packages: tuple[str, ...] = ("jax",)
    is_static: bool = False


def percent(share: float) -> str:
    """Writes a share as a percentage: 0.5 as '50.0 %'."""
    return f"{100 * share:.1f} %"


def spread(shares: Sequence[float]) -> str:
    """Writes the shares of several seeds in per cent: '98.3 / 97.7 / 87.2'."""
    return " / ".join(f"{100 * share:.1f}" for share in shares)


def significant(value: float) -> str:
    """Writes a number with three significant digits, and no exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def quickstart(results: Sequence[Any]) -> Rows:
    """Reads the quickstart's retention.json."""
    (result,) = results
    seeds = ", ".join(map(str, result["seeds"]))
    rows = [[f"easy-VQA test split, mean of seeds {seeds}", "accuracy", *KINDS, "retention"]]
    for name, shown in QUICKSTART.items():
        row = result["rows"][name]
        accuracy = percent(row["accuracy"])
        kinds = [percent(row["accuracy_by_question_type"][kind]) for kind in KINDS]
        rows.append([shown, f"**{accuracy}**" if shown.startswith("**") else accuracy, *kinds,
                     percent(row["retention"])])
    return rows


def mosaic(results: Sequence[Any]) -> Rows:
    """Reads the mosaics' tables.json; the row that keeps most comes first."""
    (result,) = results
    seeds = f"seeds {' / '.join(map(str, result['seeds']))}"
    rows = [[f"2 × 2 mosaics, {result['split']} split, {result['questions']:,} questions", "accuracy, mean", seeds,
             "retention, mean", seeds, "x / upper, mean"]]
    mean = statistics.fmean
    for name, row in sorted(result["rows"].items(), key=lambda item: -mean(item[1]["retention"])):
        accuracy, kept, of_upper = row["accuracy"], row["retention"], row["of_upper"]
        rows.append([MOSAIC.get(name, name), percent(mean(accuracy)), spread(accuracy), percent(mean(kept)),
                     spread(kept), percent(mean(of_upper))])
    return rows


def mosaic_recipes(results: Sequence[Any]) -> Rows:
    """Reads the mosaics' recipes.json, in its order: for each number of VoCo tokens the plain method first."""
    (result,) = results
    seeds = f"seeds {' / '.join(map(str, result['seeds']))}"
    rows = [[f"2 × 2 mosaics, {result['split']} split, {result['questions']:,} questions", "accuracy, mean", seeds,
             "retention, mean", seeds]]
    return rows + [[MOSAIC.get(name, name), percent(statistics.fmean(row["accuracy"])), spread(row["accuracy"]),
                    percent(statistics.fmean(row["retention"])), spread(row["retention"])]
                   for name, row in result["rows"].items()]


def mosaic_elastic(results: Sequence[Any]) -> Rows:
    """Reads, from the mosaics' tables.json, models that were trained with eight VoCo tokens and read with fewer."""
    (result,) = results
    rows = [["trained with eight VoCo tokens", *(f"seed {seed}" for seed in result["seeds"]), "retention, mean"]]
    return rows + [[name, *map(percent, row["accuracy"]), percent(statistics.fmean(row["retention"]))]
                   for name, row in result["table_4"].items()]


def mosaic_refining(results: Sequence[Any]) -> Rows:
    """Reads, from the mosaics' tables.json, how many tokens the elastic model reads with a calibrated threshold."""
    (result,) = results
    found = result["refining"]
    asked = f"{100 * found['asked_for']:g} %"
    columns = [f"`vocos=\"auto\"`, calibrated for {asked}", "questions", "same answer as from all 8",
               "VoCo tokens read, mean"]
    return [columns, *([f"seed {seed}", f"{questions:,}", percent(agreement), f"{tokens:.2f}"]
                       for seed, questions, agreement, tokens in zip(
                           result["seeds"], found["questions"], found["agreement"], found["mean_tokens"], strict=True))]


def video_order(results: Sequence[Any]) -> Rows:
    """Reads the video quickstart's video.json."""
    (result,) = results
    seeds = ", ".join(map(str, result["seeds"]))
    rows = [[f"mean of seeds {seeds}", "all", *CLIPS, "frame t of 8"]]
    for name, row in result["rows"].items():
        rows.append([name, percent(row["accuracy"]), *(percent(row["by_type"][kind]) for kind in CLIPS),
                     percent(row["by_frames"]["8"]["by_type"]["frame t"])])
    return rows


def agreement(results: Sequence[Any]) -> Rows:
    """Reads the quickstart's retention.json: answers from VoCo caches that are those of a single pass."""
    return [["answers", "compared with", "result"],
            ["answers from a cache", "the single pass", _same(results[0]["two_stage"])]]


def torch_agreement(results: Sequence[Any]) -> Rows:
    """Reads what torch_agreement.py found."""
    return [["answers", "compared with", "result"],
            ["answers of a PyTorch export", "vocojax", _same(results[0])]]


def _same(counts: Mapping[str, int]) -> str:
    return f"{counts['identical_answers']:,} of {counts['questions']:,} are the same"


def torch_peer(results: Sequence[Any]) -> Rows:
    """Reads step_report's figures."""
    (report,) = results
    return [["58 M parameters, fp32", "CPU-seconds, ours / torch's"],
            *([part, f"{entry['ratio']:.2f}"] for part, entry in report.items())]


def efficiency(results: Sequence[Any]) -> Rows:
    """Reads efficiency's figures: one row for each number of text tokens, with one VoCo token."""
    (report,) = results
    by_text: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in report["rows"]:
        if row["vocos"] in (0, 1):
            by_text.setdefault(row["text"], {})[row["method"]] = row
    first = next(iter(by_text.values()))
    mib = {method: first[method]["cache_bytes"] / 2**20 for method in ("full cache", "VoCo cache")}
    rows = [["text tokens", "FLOPs without cache", f"full cache, {mib['full cache']:.0f} MiB",
             f"1 VoCo token, {mib['VoCo cache']:.1f} MiB", "text alone", "first token without cache / VoCo"]]
    for text, by_method in by_text.items():
        none, full, voco, alone = (
            by_method[name] for name in ("no cache", "full cache", "VoCo cache", "text only"))
        saved = 100 * (voco["flops"] / none["flops"] - 1)
        first_token = [1000 * row["measured_first_token_seconds"] for row in (none, voco)]
        rows.append([str(text), f"{none['flops'] / 1e12:.2f} T", f"{full['flops'] / 1e12:.3f} T",
                     f"{voco['flops'] / 1e12:.3f} T ({saved:.1f} %)".replace("-", "−"),
                     f"{alone['flops'] / 1e12:.3f} T", f"{first_token[0]:.0f} / {first_token[1]:.0f} ms"])
    return rows


def kernels(results: Sequence[Any]) -> Rows:
    """Reads kernel_report's figures: milliseconds of vocojax's kernel and of splash attention."""
    (report,) = results
    columns = [chip.partition(":")[0] for chip in CHIPS]
    rows = [["layout", f"{columns[0]} ours / splash", *columns[1:]]]
    for letter, name in LAYOUTS.items():
        cells = ([significant(1000 * report["layouts"][letter][chip][who]["seconds"]) for who in ("ours", "splash")]
                 for chip in CHIPS)
        rows.append([name, *(f"{ours} / {splash} ms" for ours, splash in cells)])
    return rows


def data(results: Sequence[Any]) -> Rows:
    """Reads data_report's figures."""
    (report,) = results
    rates = report["images_per_second_per_core"]
    return [
        ["per core of this machine's CPU", ""],
        ["JPEG file to packed batch, images/s per core", f"{rates['vocojax']:.0f}"],
        ["the same by PIL + transformers' CLIP processor in a torch `DataLoader` (interleaved, medians of 5)",
         f"{rates['torch_dataloader']:.0f}"],
        ["ratio of the two", f"{report['speedup']:.2f}"],
        ["row fill at 2,048 tokens (579 an image, 20 to 900 of text, 6 % text alone)", percent(report["fill_ratio"])],
        [f"first batch of a {report['records']:,}-record JSON ({report['json_gib']:.2f} GiB); when its Arrow file is "
         "made first", f"{report['first_batch_seconds_665k']:.1f} s; "
         f"{report['first_batch_seconds_665k_building_the_file']:.1f} s"],
        ["resident memory of that process", f"{report['resident_gib_665k']:.2f} GiB"],
    ]


def steps(results: Sequence[Any]) -> Rows:
    """Reads the compile reports of a 7B's training step, with what its attention, its collectives and vision take."""
    rows = [["7B on", "rematerialisation", "rows per chip", "s/step", "MFU bound", "tokens/s/chip",
             "decoder alone, tokens/s/chip", "of the step, attention", "of the step, collectives that nothing hides",
             "of the step, vision tower", "GB per chip"]]
    for report in results:
        whole, seconds = report["estimated_seconds"], report["seconds"]
        rows.append([
            report["topology"], report["remat"], str(report["rows_per_device"]), f"{whole:.3f}",
            f"{report['mfu_bound']:.0%}".replace("%", " %"), f"{report['tokens_per_second_per_device']:,.0f}",
            f"{report['decoder_tokens_per_second_per_device']:,.0f}", percent(seconds["attention"] / whole),
            percent(seconds["interconnect"] / whole), percent(report["vision_share"]),
            f"{report['peak_bytes'] / 1e9:.1f}"])
    return rows


def best_7b(results: Sequence[Any]) -> Rows:
    """Reads the compile reports of the paper's stage and of the best recipe's, in turns.

    Raises:
      NoResult: one of a pair is missing.
    """
    if len(results) % len(BEST):
        raise NoResult("best_7b: the command stopped before its end; run docs/measure.py best_7b again")
    rows = [["7B, everything rematerialised", "stage", "rows per chip", "s/step", "MFU bound", "GB per chip"]]
    for report, stage in zip(results, itertools.cycle(BEST), strict=False):
        rows.append([report["topology"], stage, str(report["rows_per_device"]), f"{report['estimated_seconds']:.3f}",
                     f"{report['mfu_bound']:.0%}".replace("%", " %"), f"{report['peak_bytes'] / 1e9:.2f}"])
    return rows


def video_memory(results: Sequence[Any]) -> Rows:
    """Reads the compile reports of a video stage with rising numbers of frames, in both plans."""
    (reports,) = results
    rows = [["plan", "frames per row", "arguments, GB per chip", "temporary, GB per chip", "MB per further frame",
             "s per step (roofline)"]]
    before: Mapping[str, Any] = {"plan": ""}
    for report in reports:
        kinds = report["hbm_bytes_per_device"]
        arguments = sum(size for kind, size in kinds.items() if kind != "temporaries")
        temporary, grown, seconds = f"{kinds['temporaries'] / 1e9:.2f}", "", ""
        if report["plan"] == before["plan"]:
            more = report["peak_bytes"] - before["peak_bytes"]
            grown = significant(more / (report["frames"] - before["frames"]) / 1e6)
        if report["fits"]:
            seconds = f"{report['estimated_seconds']:.2f}"
        else:
            temporary += f": does not fit into {report['hbm_limit'] / 1e9:.2f}"
        rows.append([f"`{report['plan']}`", f"{report['frames']:,}", f"{arguments / 1e9:.2f}", temporary, grown,
                     seconds])
        before = report
    return rows


STEPS = """\
one() ( . launch/xla_flags.sh "${1%%:*}"; python launch/compile_report.py --config=configs/voco.py --topology="$1" \
--config.remat="$2" --config.batch_size="$4" --json="runs/measured/steps/$1-$2-$3.json" )
mkdir -p runs/measured/steps
for rows in 1 2 8; do one v5e:16x16 full $rows $((256 * rows)); one v5p:4x4x4 full $rows $((64 * rows)); done
one v5e:16x16 minimal 2 512; one v5p:4x4x4 minimal 2 128; one v5p:4x4x4 minimal 8 512"""

BEST_7B = """\
one() ( . launch/xla_flags.sh "${1%%:*}"; python launch/compile_report.py --config="configs/$3.py" --topology="$1" \
--config.batch_size="$2" --json="runs/measured/best_7b/$1-$3.json" )
mkdir -p runs/measured/best_7b
for stage in voco voco_7b_best; do one v5e:16x16 256 $stage; one v5p:4x4x4 128 $stage; done"""

TABLES = {
    "agreement": Table("bash launch/quickstart.sh --seeds 0,1,2", "runs/quickstart/retention.json", agreement,
                       "15 CPU-minutes, the extra quickstart"),
    "best_7b": Table(BEST_7B, "runs/measured/best_7b/*.json", best_7b, "20 CPU-minutes, 4 GB of memory, the extra tpu",
                     ("jax", "libtpu"), True),
    "data": Table("python launch/data_report.py --json=runs/measured/data.json", "runs/measured/data.json", data,
                  "5 CPU-minutes, 2 GB of disk, the extra test", ("jax", "torch", "transformers")),
    "efficiency": Table(
        "python launch/efficiency.py --config=configs/voco.py --vocos=1,8,128 --text=32,64,128 "
        "--json=runs/measured/efficiency.json", "runs/measured/efficiency.json", efficiency, "20 CPU-minutes"),
    "kernels": Table(
        "python launch/kernel_report.py --topology=v5e:1x1,v5p:1x1x1,v6e:1x1 --json=runs/measured/kernels.json",
        "runs/measured/kernels.json", kernels, "15 CPU-minutes, the extra tpu", ("jax", "libtpu"), True),
    "mosaic": Table("bash launch/quickstart.sh --mosaic --seeds 0,1,2", "runs/mosaic/tables.json", mosaic,
                    "3 CPU-hours, the extra quickstart"),
    "mosaic_elastic": Table("bash launch/quickstart.sh --mosaic --seeds 0,1,2", "runs/mosaic/tables.json",
                            mosaic_elastic, "3 CPU-hours (those of mosaic), the extra quickstart"),
    "mosaic_recipes": Table("bash launch/quickstart.sh --mosaic --seeds 0,1,2 --full", "runs/mosaic/recipes.json",
                            mosaic_recipes, "5 CPU-hours with those of mosaic, the extra quickstart"),
    "mosaic_refining": Table("bash launch/quickstart.sh --mosaic --seeds 0,1,2", "runs/mosaic/tables.json",
                             mosaic_refining, "3 CPU-hours (those of mosaic), the extra quickstart"),
    "quickstart": Table("bash launch/quickstart.sh --seeds 0,1,2", "runs/quickstart/retention.json", quickstart,
                        "15 CPU-minutes, the extra quickstart"),
    "steps": Table(STEPS, "runs/measured/steps/*.json", steps, "50 CPU-minutes, 4 GB of memory, the extra tpu",
                   ("jax", "libtpu"), True),
    "torch_agreement": Table(
        "python launch/convert.py --source=runs/quickstart/seed_0/voco_1 --target=runs/measured/export "
        "--target_layout=huggingface\n"
        "python docs/torch_agreement.py runs/quickstart/seed_0/voco_1 runs/measured/export "
        "runs/measured/torch_agreement.json", "runs/measured/torch_agreement.json", torch_agreement,
        "runs/quickstart (quickstart makes it), 2 CPU-minutes, the extra test", ("jax", "torch", "transformers")),
    "torch_peer": Table("python launch/step_report.py --json=runs/measured/torch_peer.json",
                        "runs/measured/torch_peer.json", torch_peer, "5 CPU-minutes, the extra test",
                        ("jax", "torch", "transformers")),
    "video_memory": Table(
        ". launch/xla_flags.sh v5p; python launch/compile_report.py --config=configs/video_7b.py --topology=v5p:2x2x1 "
        "--frames=8,64,512,2048 --fast --json=runs/measured/video_memory.json", "runs/measured/video_memory.json",
        video_memory, "10 CPU-minutes, the extra tpu", ("jax", "libtpu"), True),
    "video_order": Table("bash launch/quickstart.sh --video --seeds 0,1,2", "runs/quickstart_video/video.json",
                         video_order, "2 CPU-hours, the extra quickstart"),
}


def results(table: Table, root: Path) -> list[Path]:
    """Returns the result files of a table that are there."""
    return sorted(root.glob(table.result))
