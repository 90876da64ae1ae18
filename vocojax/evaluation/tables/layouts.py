"""The paper's tables: which benchmarks each has as columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

JUDGED = "judge's score (0 to 5)"


@dataclass(frozen=True)
class Column:
    """A column of a table: one figure of one benchmark.

    Attributes:
      benchmark: its name in the registry.
      title: the column's head.
      metric: the figure's name in the benchmark's result; "" for the one that papers report first.
      is_optional: the column is left out where no row has the figure, and it is in no mean.
    """

    benchmark: str
    title: str
    metric: str = ""
    is_optional: bool = False


@dataclass(frozen=True)
class Layout:
    """A table without its rows.

    Attributes:
      name: `table1` and so on.
      caption: what it shows.
      columns: from left to right.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]


IMAGES = (
    Column("gqa", "GQA"), Column("mmbench_en", "MMB"), Column("mme", "MME"), Column("pope", "POPE"),
    Column("seed_image", "SEED"), Column("scienceqa_image", "SQA-I"), Column("vqav2_test_dev", "VQAv2"),
)
COMPRESSORS = (  # the benchmarks of LLaMA-VID's own ablations
    Column("gqa", "GQA"), Column("pope", "POPE"), Column("scienceqa_image", "SQA-I"), Column("textvqa", "TextVQA"),
)
FINE_GRAINED = (
    Column("refcoco_val", "RefCOCO val"), Column("refcoco_testA", "testA"), Column("refcoco_testB", "testB"),
    Column("refcoco+_val", "RefCOCO+ val"), Column("refcoco+_testA", "+ testA"), Column("refcoco+_testB", "+ testB"),
    Column("refcocog_val", "RefCOCOg val"), Column("refcocog_test", "g test"), Column("grit_refexp", "GRIT"),
    Column("reg_refcocog_val", "REG"), Column("pointqa_local_box_test", "PointQA local"),
    Column("pointqa_twice_object_box_test", "PointQA twice"),
)
VIDEOS = tuple(
    column for name, title in (("msvd_qa", "MSVD-QA"), ("msrvtt_qa", "MSRVTT-QA"), ("activitynet_qa", "ActivityNet-QA"))
    for column in (Column(name, title), Column(name, f"{title} score", JUDGED, is_optional=True))
)

LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (
    Layout("table1", "One token per image, between the bounds", IMAGES),
    Layout("table2", "Numbers of VoCo tokens, each trained on its own", IMAGES),
    Layout("table3", "VoCo tokens and LLaMA-VID's compressor", COMPRESSORS),
    Layout("table4", "Trained with one number of VoCo tokens, read with fewer", IMAGES),
    Layout("table5", "Fine-grained tasks: REC (IoU > 0.5), REG (CIDEr) and PointQA", FINE_GRAINED),
    Layout("table6", "Video question answering", VIDEOS),
    Layout("table8", "Video question answering over resolutions and numbers of VoCo tokens per frame", VIDEOS),
)}


def layout_of(table: str, benchmarks: Sequence[str] = ()) -> Layout:
    """Returns a table's layout, with other benchmarks in place of the paper's if there are any.

    Args:
      table: a name of `LAYOUTS`.
      benchmarks: names of the registry; a benchmark that the paper's table has keeps its columns.
    """
    layout = LAYOUTS[table]
    if not benchmarks:
        return layout
    known = {name: [column for column in layout.columns if column.benchmark == name] for name in benchmarks}
    columns = tuple(column for name in benchmarks for column in known[name] or [Column(name, name)])
    return Layout(layout.name, layout.caption, columns)
