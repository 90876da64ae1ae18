"""Tables of several models: the paper's Table 1 from its own figures, and how rows are named."""

import dataclasses
import json
import os

import pytest

from tests.evaluation.test_command import evaluate
from vocojax.data.conversation import template
from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.registry import BENCHMARKS, open_benchmark
from vocojax.evaluation.running import Asking
from vocojax.evaluation.tables.asking import answer_row
from vocojax.evaluation.tables.layouts import LAYOUTS, Column, Layout, layout_of
from vocojax.evaluation.tables.page import Answered, shown_gold, worst_and_best, write_page
from vocojax.evaluation.tables.rows import RowSource, read_rows
from vocojax.evaluation.tables.table import Row, Table, with_given
from vocojax.evaluation.tables.writing import latex, markdown
from vocojax.inference.assistant import Assistant

NAMES = ("gqa", "mmbench_en", "mme", "pope", "seed_image", "scienceqa_image", "vqav2_test_dev")
PAPER = {  # paper Table 1
    "Lower bound": (1, (37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2)),
    "VoCo-LLaMA": (1, (57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3)),
    "Upper bound": (576, (61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7)),
}
GIVEN = {name: {"tokens": tokens, **dict(zip(NAMES, figures, strict=True))} for name, (tokens, figures) in
         PAPER.items()}


@pytest.fixture(scope="module")
def paper():
    return Table(LAYOUTS["table1"], with_given([], LAYOUTS["table1"], GIVEN, "paper.json"))


def test_the_papers_table_1(paper):
    """The percentages are those that the paper prints under its figures."""
    assert markdown(paper).splitlines()[2:] == [
        "| model                       | tokens |     GQA |     MMB |     MME |    POPE |    SEED |   SQA-I |   VQAv2 |"
        "    mean |",
        "|-----------------------------|-------:|--------:|--------:|--------:|--------:|--------:|--------:|--------:|"
        "--------:|",
        "| Upper bound                 |    576 |    61.1 |    64.0 | 1,487.2 |    85.0 |    57.9 |    66.5 |    77.7 |"
        "         |",
        "| (x − lower)/(upper − lower) |        | 100.0 % | 100.0 % | 100.0 % | 100.0 % | 100.0 % | 100.0 % | 100.0 % |"
        " 100.0 % |",
        "| x/upper                     |        | 100.0 % | 100.0 % | 100.0 % | 100.0 % | 100.0 % | 100.0 % | 100.0 % |"
        " 100.0 % |",
        "| VoCo-LLaMA                  |      1 |    57.0 |    58.8 | 1,323.3 |    81.4 |    53.7 |    65.4 |    72.3 |"
        "         |",
        "| (x − lower)/(upper − lower) |        |  82.5 % |  87.5 % |  81.2 % |  88.4 % |  80.0 % |  81.0 % |  85.2 % |"
        "  83.7 % |",
        "| x/upper                     |        |  93.3 % |  91.9 % |  89.0 % |  95.8 % |  92.7 % |  98.3 % |  93.1 % |"
        "  93.4 % |",
        "| Lower bound                 |      1 |    37.7 |    22.3 |   617.3 |    53.9 |    36.9 |    60.7 |    41.2 |"
        "         |",
        "| (x − lower)/(upper − lower) |        |   0.0 % |   0.0 % |   0.0 % |   0.0 % |   0.0 % |   0.0 % |   0.0 % |"
        "   0.0 % |",
        "| x/upper                     |        |  61.7 % |  34.8 % |  41.5 % |  63.4 % |  63.7 % |  91.3 % |  53.0 % |"
        "  58.5 % |",
    ]
    voco = paper.as_json()["rows"][1]
    assert (voco["name"], voco["tokens"]) == ("VoCo-LLaMA", 1)
    assert (round(voco["mean_retention"], 3), round(voco["mean_of_upper"], 3)) == (0.837, 0.934)
    assert round(voco["retention"]["MME"], 3) == 0.812 and voco["figures"]["MME"] == 1323.3


def test_latex_of_the_papers_table_1(paper):
    lines = latex(paper).splitlines()
    assert r"  model & tokens & GQA & MMB & MME & POPE & SEED & SQA-I & VQAv2 & mean \\" in lines
    assert r"  VoCo-LLaMA & 1 & 57.0 & 58.8 & 1,323.3 & 81.4 & 53.7 & 65.4 & 72.3 &  \\" in lines
    (share,) = [line for line in lines if "83.7" in line]
    assert share.startswith(r"  \quad\footnotesize (x $-$ lower)/(upper $-$ lower) &  & \footnotesize 82.5 \% &")
    assert lines[3] == r"  \begin{tabular}{lrrrrrrrrr}" and lines[-1] == r"\end{table}"


def test_what_is_missing_is_named_and_no_mean_hides_it():
    layout = Layout("table1", "c", (Column("gqa", "GQA"), Column("pope", "POPE"), Column("vqav2_test_dev", "VQAv2")))
    rows = (Row("Upper bound", {"GQA": 60.0, "POPE": 80.0}), Row("A_1", {"GQA": 50.0}, problems=(("pope", "no disk"),)),
            Row("B", {"GQA": 50.0, "POPE": 70.0}), Row("Lower bound", {"GQA": 40.0, "POPE": 60.0}))
    table = Table(layout, rows)
    written = markdown(table)
    assert [line.split("|")[3:6] for line in written.splitlines() if "| A_1 " in line] == [
        ["    50.0 ", "  failed ", "     – "]]
    assert table.retention(rows[1]).mean_retention is None  # not the mean over GQA alone
    assert table.retention(rows[2]).mean_retention == 0.5
    assert written.endswith("\n* no row has a figure for VQAv2; the means are over the other 2 columns\n"
                            "* A_1 failed on pope: no disk\n")
    assert r"A\_1" in latex(table) and "% A_1 failed on pope: no disk" in latex(table)
    scored = dataclasses.replace(table, conventions={"gqa": "official", "pope": "lmms-eval"})
    assert [column["convention"] for column in scored.as_json()["columns"]] == ["official", "lmms-eval", ""]
    assert scored.remarks[:2] == ("convention official: gqa", "convention lmms-eval: pope")
    without = dataclasses.replace(table, rows=rows[1:3])
    assert "upper" not in markdown(without) and "mean" not in markdown(without).splitlines()[2]
    assert without.as_json()["rows"][0]["mean_retention"] is None


def test_given_figures_fill_rows_and_must_fit():
    layout = LAYOUTS["table1"]
    rows = [Row("VoCo-1", {"GQA": 57.1}, 1, "runs/voco", (("vqav2_test_dev", "labels are not public"),))]
    (filled,) = with_given(rows, layout, {"VoCo-1": {"vqav2_test_dev": 72.3}}, "f.json")
    assert filled == Row("VoCo-1", {"GQA": 57.1, "VQAv2": 72.3}, 1, "runs/voco", ())
    for given, message in (({"A": {"gqo": 1}}, "f.json: 'A' has a figure for 'gqo', which is not in table1"),
                           ({"A": {"gqa": "57"}}, "f.json: 'A' must have a number for 'gqa', got '57'"),
                           ({"A": 57.0}, "but 'A' is no object")):
        with pytest.raises(InputError) as error:
            with_given([], layout, given, "f.json")
        assert message in str(error.value)


def test_rows_as_a_user_names_them():
    assert read_rows(["VoCo-8=runs/v=8,x,vocos=8/2", "Pool=gs://b/pool,visibility=causal"], upper="runs/up") == [
        RowSource("Upper bound", "runs/up", None, "causal"),
        RowSource("VoCo-8, 8 read", "runs/v=8,x", 8), RowSource("VoCo-8, 2 read", "runs/v=8,x", 2),
        RowSource("Pool", "gs://b/pool", None, "causal"),
        RowSource("Lower bound", "runs/up", None, "voco"),  # the upper bound's weights through the VoCo mask
    ]
    assert read_rows([], lower="a,vocos=2") == [RowSource("Lower bound", "a", 2, "voco")]
    assert read_rows(["Avg. Pool + Linear (1)=a"])[0].folder == "Avg._Pool_+_Linear_1"


@pytest.mark.parametrize(("rows", "message"), [
    (["runs/voco"], "--row: must be NAME=CHECKPOINT[,vocos=N][,visibility=voco|causal], got 'runs/voco'"),
    (["A=r,vocos=0"], "--row 'A': vocos must be whole numbers > 0 such as 4 or 8/4/2/1, got '0'"),
    (["A=r,visibility=all"], "--row 'A': visibility must be one of voco, causal, got 'all'"),
    (["A=r", "A=s"], "--row: 2 rows are called 'A'; give each another name"),
    (["A 1=r", "A_1=s"], "--row: 2 rows keep their answers in the folder 'A_1'; give each another name"),
])
def test_rows_that_cant_be_read(rows, message):
    with pytest.raises(InputError) as error:
        read_rows(rows)
    assert str(error.value) == message


def test_layouts_name_benchmarks_that_exist():
    for layout in LAYOUTS.values():
        assert {column.benchmark for column in layout.columns} <= BENCHMARKS.keys()
        titles = [column.title for column in layout.columns]
        assert len(set(titles)) == len(titles)
    assert [column.title for column in layout_of("table6", ["easy_vqa", "msvd_qa"]).columns] == [
        "easy_vqa", "MSVD-QA", "MSVD-QA score"]


@pytest.fixture(scope="module")
def pope(data_root):
    return open_benchmark("pope_random", data_root)


@pytest.fixture
def weights(tmp_path):
    """A directory that stands for a row's weights."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.bin").write_text("1")
    return tmp_path / "weights"


def test_a_row_is_made_again_from_stored_answers_without_its_model(tiny_model, words, pope, weights, tmp_path):
    loaded = []

    def load(row):
        loaded.append(row.name)
        return Assistant(tiny_model, words, template("short"), row.visibility or "voco")

    def answer(row, load=load, name="row"):
        return answer_row(row, [pope], tmp_path / name, Asking("tiny", num_vocos=row.vocos), load)

    row = RowSource("VoCo", str(weights))
    first = answer(row)
    assert len(first.texts["pope_random"]) == 4 and first.tokens == tiny_model.config.voco.num_vocos
    assert answer(row) == first and loaded == ["VoCo"]
    os.utime(weights / "model.bin", (1, 10**6))  # changed weights are looked at, and found to be the same
    assert answer(row) == first and loaded == ["VoCo"] * 2
    other = answer(dataclasses.replace(row, visibility="causal"))
    assert "holds the answers of another run (visibility is 'voco' there, 'causal' here)" in (
        other.problems["pope_random"]) and not other.texts
    (weights / "model.bin").unlink()
    weights.rmdir()
    assert answer(row, load=None) == first  # the weights are gone, the answers are not


def test_a_row_whose_model_cant_be_loaded_is_named(pope, weights, tmp_path):
    def load(row):
        raise InputError(f"{row.checkpoint}: holds no weights\nsecond line")

    answers = answer_row(RowSource("A", str(weights)), [pope], tmp_path, Asking("tiny"), load)
    assert answers.problems == {"pope_random": f"{weights}: holds no weights"} and not answers.texts


def test_the_worst_and_the_best_examples_are_shown_with_every_rows_answer(pope, tmp_path):
    marks = {"Upper bound": (1.0, 1.0, 0.0, 1.0), "A": (1.0, 0.0, 1.0, None), "B": (0.0, 0.0, 1.0, None),
             "Lower bound": (0.0, 0.0, 0.0, 0.0)}
    texts = {name: [f"{name} <{place}>" for place in range(4)] for name in marks}
    items = [dataclasses.replace(item, visuals=(*item.visuals, str(place))) for place, item in enumerate(pope.items)]
    answered = Answered(pope, items, texts, marks)
    assert worst_and_best(answered) == ([1, 0], [2])  # gains -1, -0.5 and +1; the last one does not count
    assert worst_and_best(answered, 1) == ([1], [2])
    rows = tuple(Row(name, {"POPE": 50.0}) for name in marks)
    write_page(tmp_path / "page.html", Table(Layout("table1", "c", (Column("pope_random", "POPE"),)), rows),
               [Answered(pope, pope.items, texts, marks)])
    page = (tmp_path / "page.html").read_text()
    assert "pope_random: worst examples" in page and "pope_random: best examples" in page
    assert "<td class=wrong>B &lt;1&gt;" in page and "<td class=right>B &lt;2&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 3 and "can't be read" not in page


@pytest.mark.parametrize(("gold", "text"), [
    ("yes", "yes"), ([0, 1.5], "[0, 1.5]"), (["12", "12", "13"], "12 / 13"), (None, ""),
    ({"answers": [{"answer": "a"}, {"answer": "b"}]}, "a / b"),
])
def test_gold_answers_are_shown_as_text(gold, text):
    assert shown_gold(gold) == text


def test_the_command_makes_a_table_of_given_figures(tmp_path):
    figures = tmp_path / "paper.json"
    figures.write_text(json.dumps(GIVEN))
    flags = ["--table=table1", f"--output={tmp_path}", f"--figures={figures}"]
    done = evaluate(*flags)
    assert done.returncode == 0, done.stderr
    assert "|  85.2 % |  83.7 % |" in done.stdout and "|  93.1 % |  93.4 % |" in done.stdout
    written = json.loads((tmp_path / "table1.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["Upper bound", "VoCo-LLaMA", "Lower bound"]
    assert all((tmp_path / f"table1.{suffix}").exists() for suffix in ("md", "tex", "html"))
    done = evaluate("--table=table7", "--row=A=b")
    assert done.returncode == 1
    assert done.stderr == ("error: --table must be one of table1, table2, table3, table4, table5, table6, table8, got "
                           "'table7'\n")
