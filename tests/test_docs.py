"""The documentation: its commands exist, its code runs, its links lead somewhere, its figures are stored."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image

import vocojax
from docs import front_page, measure, tables
from tests.test_quickstart import Tiny
from vocojax.cli.main import VERBS

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs"
PAGES = [*sorted(SITE.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINKED = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md")), *(ROOT / "notebooks").glob("*.ipynb")]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
RUN = ("quickstart", "method", "caches", "pytorch")  # pages whose blocks without a title a test runs
MODULES = {f"launch/{module}.py": module for module in VERBS.values()}


class Block(NamedTuple):
    """A block of code on a page.

    Attributes:
      page: its file.
      language: of the code.
      needs: what it needs that a reader may not have; "" for a block that a test runs.
      code: the lines.
    """

    page: Path
    language: str
    needs: str
    code: str


def blocks(page):
    return [Block(page, *match.groups(default="")) for match in FENCE.finditer(page.read_text())]


def commands(code):
    """Yields the words of each command of a shell block that is one of this package's, and its module."""
    text = re.sub(r"(^|\s)#.*", "", code.replace("\\\n", " "))
    for line in re.findall(r"""(?:[^\n"']|"[^"]*"|'[^']*')+""", text):
        words = shlex.split(line)
        for index, word in enumerate(words):
            if word in MODULES:
                yield MODULES[word], words[index + 1 :]
            elif word == "vocojax" and index == 0 and len(words) > 1:
                yield VERBS.get(words[1], words[1]), words[2:]


@pytest.fixture(scope="module")
def known_flags():
    """The flags of every command, by its module. They are global: another process defines them."""
    listing = """
import importlib, json, sys
from absl import app, flags, logging
known = {}
for module in sys.argv[1:]:
    there = set(flags.FLAGS)
    importlib.import_module(f"vocojax.cli.{module}").define_flags()
    known[module] = sorted(set(flags.FLAGS) - there)
    for name in known[module]:
        delattr(flags.FLAGS, name)
print(json.dumps(known))
"""
    done = subprocess.run([sys.executable, "-c", listing, *VERBS.values()], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return {module: {name.replace("-", "_") for name in names} for module, names in json.loads(done.stdout).items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_every_command_exists(page, known_flags):
    for block in blocks(page):
        if block.language != "bash":
            continue
        for module, words in commands(block.code):
            own = words[: words.index("--")] if "--" in words else words
            asked = {word[2:].partition("=")[0].partition(".")[0].replace("-", "_")
                     for word in own if word.startswith("--")}
            unknown = asked - known_flags[module] - {"help"}
            assert not unknown, f"{page.name}: {module} has no flag {sorted(unknown)}"


def test_a_block_is_run_by_a_test_or_says_what_it_needs():
    for page in SITE.glob("*.md"):
        for block in blocks(page):
            is_run = page.stem in RUN and not block.needs
            assert is_run or block.language not in ("bash", "python") or re.match(r"Needs \w", block.needs), block


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in SITE.glob("*.md") if f": {page.name}\n" not in text]
    assert yaml.safe_load(text)["site_name"] == "vocojax"


def test_every_public_name_is_on_the_page_of_the_api():
    text = (SITE / "api.md").read_text()
    assert not [name for name in vocojax.__all__ if f"`{name}`" not in text]


def test_commands_of_the_site_are_written_in_one_form():
    """`vocojax VERB` and a config's short name; the quickstart says once what else there is."""
    odd = [(block.page.name, line) for page in SITE.glob("*.md") for block in blocks(page) if block.language == "bash"
           for line in block.code.splitlines() if re.search(r"python launch/|--config=configs/", line)]
    assert not odd


@pytest.mark.parametrize("path", sorted((SITE / "measured").glob("*.json")), ids=lambda path: path.stem)
def test_stored_figures_name_their_origin(path):
    entry = json.loads(path.read_text())
    named = {key for key, value in entry.items() if value}
    assert {"title", "columns", "rows", "command", "machine", "versions", "date"} <= named
    assert all(len(row) == len(entry["columns"]) for row in entry["rows"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry["date"])
    assert "(static)" not in entry["title"] or re.search(r"libtpu \d", entry["versions"])
    assert entry["command"] == tables.TABLES[path.stem].command if path.stem in tables.TABLES else entry["note"]


def test_every_table_that_a_command_makes_is_stored():
    assert set(tables.TABLES) <= {path.stem for path in (SITE / "measured").glob("*.json")}


_OF_BEST = {"topology": "v5p:4x4x4", "rows_per_device": 2, "estimated_seconds": 0.6378, "mfu_bound": 0.56,
            "peak_bytes": 4.134e9}
MADE = {  # a table, a result of its command, and its rows after the columns
    "quickstart": ({"seeds": [0], "rows": {
        name: {"accuracy": 0.5, "accuracy_by_question_type": {"colour": 0.25, "shape": 1.0, "yes/no": 0.125},
               "retention": 0.975} for name in ("Upper Bound", "VoCo-1", "Lower Bound")}}, [
        ["Upper Bound (reads all 16 vision tokens)", "50.0 %", "25.0 %", "100.0 %", "12.5 %", "97.5 %"],
        ["**VoCo-1 (one token)**", "**50.0 %**", "25.0 %", "100.0 %", "12.5 %", "97.5 %"],
        ["Lower Bound (VoCo mask without VoCo training)", "50.0 %", "25.0 %", "100.0 %", "12.5 %", "97.5 %"]]),
    "mosaic": ({"seeds": [0, 1], "split": "test", "questions": 4000, "rows": {
        "VoCo-1": {"accuracy": [0.5, 0.25], "retention": [0.25, 0.5], "of_upper": [0.5, 0.25]},
        "Upper Bound": {"accuracy": [1.0, 1.0], "retention": [1.0, 1.0], "of_upper": [1.0, 1.0]}}}, [
        ["Upper Bound (16 vision tokens)", "100.0 %", "100.0 / 100.0", "100.0 %", "100.0 / 100.0", "100.0 %"],
        ["VoCo-1", "37.5 %", "50.0 / 25.0", "37.5 %", "25.0 / 50.0", "37.5 %"]]),
    "mosaic_refining": ({"seeds": [0], "refining": {
        "asked_for": 0.99, "questions": [4000], "agreement": [0.9912], "mean_tokens": [6.125]}},
        [["seed 0", "4,000", "99.1 %", "6.12"]]),
    "steps": ({"topology": "v5e:16x16", "remat": "full", "rows_per_device": 8, "estimated_seconds": 5.0,
               "mfu_bound": 0.614, "tokens_per_second_per_device": 3019.6,
               "decoder_tokens_per_second_per_device": 3117.2, "vision_share": 0.0212, "peak_bytes": 7.86e9,
               "seconds": {"attention": 0.25, "interconnect": 0.1}},
              [["v5e:16x16", "full", "8", "5.000", "61 %", "3,020", "3,117", "5.0 %", "2.0 %", "2.1 %", "7.9"]]),
    "video_memory": ([
        {"plan": "single_pass", "frames": 8,
         "hbm_bytes_per_device": {"frozen": 20e9, "batch": 4e8, "temporaries": 13e9},
         "peak_bytes": 33.4e9, "fits": True, "estimated_seconds": 0.75},
        {"plan": "single_pass", "frames": 512, "hbm_bytes_per_device": {"frozen": 20e9, "temporaries": 194.14e9},
         "peak_bytes": 214.14e9, "fits": False, "hbm_limit": 102.79e9, "estimated_seconds": None}], [
        ["`single_pass`", "8", "20.40", "13.00", "", "0.75"],
        ["`single_pass`", "512", "20.00", "194.14: does not fit into 102.79", "359", ""]]),
    "kernels": ({"layouts": {letter: {chip: {"ours": {"seconds": 0.00654}, "splash": {"seconds": 0.0417}}
                                      for chip in tables.CHIPS} for letter in "abcd"}},
                [[name, *["6.54 / 41.7 ms"] * 3] for name in tables.LAYOUTS.values()]),
    "best_7b": ((_OF_BEST, _OF_BEST | {"peak_bytes": 4.2e9}), [
        ["v5p:4x4x4", "configs/voco.py, N = 1", "2", "0.638", "56 %", "4.13"],
        ["v5p:4x4x4", "configs/voco_7b_best.py, N = 8, pooled", "2", "0.638", "56 %", "4.20"]]),
    "torch_peer": ({"training step": {"ratio": 0.444}}, [["training step", "0.44"]]),
    "agreement": ({"two_stage": {"identical_answers": 9673, "questions": 9673}},
                  [["answers from a cache", "the single pass", "9,673 of 9,673 are the same"]]),
}


@pytest.mark.parametrize("name", MADE)
def test_a_table_is_read_from_the_result_of_its_command(name):
    result, rows = MADE[name]
    columns, *found = tables.TABLES[name].rows(result if isinstance(result, tuple) else [result])
    assert found == rows and all(len(row) == len(columns) for row in found)


def test_a_table_of_pairs_is_not_read_from_half_of_one():
    with pytest.raises(tables.NoResult, match=r"run docs/measure\.py best_7b again"):
        tables.best_7b([_OF_BEST])


def test_every_row_is_compared_where_several_begin_alike():
    columns, twice = ["7B on", "s/step"], ["v5e", "4"]
    found = list(measure.changes([columns, ["v5e", "1"], ["v5e", "2"]], [columns, ["v5e", "3"], twice, twice]))
    assert found == ["v5e | s/step: 1 -> 3 (+200.0 %)", "v5e (2) | s/step: 2 -> 4 (+100.0 %)",
                     "v5e (3) | 7B on: nothing -> v5e", "v5e (3) | s/step: nothing -> 4"]
    assert list(measure.changes([["", "x", "y"], ["r", "1", "2"]], [["", "y"], ["r", "2"]])) == ["r | x: 1 -> nothing"]


def test_a_table_is_made_again_and_what_changed_is_said(tmp_path, monkeypatch, capsys):
    for name in ("measured", "runs"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(front_page, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(front_page, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("a\n<!-- measured peer -->\n| old |\n\nb\n")
    monkeypatch.setattr(front_page, "TABLES", {"peer": lambda: front_page.stored("torch_peer")["rows"]})
    rows = [["training step", "0.40"], ["gone", "1"]]
    columns = ["58 M parameters, fp32", "CPU-seconds, ours / torch's"]
    old = {"title": "Beside torch", "columns": columns, "rows": rows, "note": "n"}
    (tmp_path / "measured" / "torch_peer.json").write_text(json.dumps(old))
    command = """echo '{"training step": {"ratio": 0.44}, "prefill": {"ratio": 0.5}}' > runs/measured/torch_peer.json"""
    table = tables.Table(command, "runs/measured/torch_peer.json", tables.torch_peer, "nothing")
    monkeypatch.setitem(measure.TABLES, "torch_peer", table)
    assert measure.main(["--read", "torch_peer"]) == ("error: torch_peer: there is no runs/measured/torch_peer.json; "
                                                      "run docs/measure.py torch_peer, which needs nothing")
    assert measure.main(["torch_peer"]) is None
    said = capsys.readouterr().out
    assert "training step | CPU-seconds, ours / torch's: 0.40 -> 0.44 (+10.0 %)\n" in said
    assert "prefill | CPU-seconds, ours / torch's: nothing -> 0.50\n" in said and ": 1 -> nothing\n" in said
    made = json.loads((tmp_path / "measured" / "torch_peer.json").read_text())
    assert made["rows"] == [["training step", "0.44"], ["prefill", "0.50"]]
    assert (made["title"], made["note"], made["command"]) == ("Beside torch", "n", command)
    assert made["versions"].startswith("jax 0.")
    assert (tmp_path / "README.md").read_text() == (
        "a\n<!-- measured peer -->\n| training step | 0.44 |\n|---|---|\n| prefill | 0.50 |\n\nb\n")
    assert measure.main(["--check"]) is None
    (tmp_path / "README.md").write_text("<!-- measured peer -->\n| training step | 0.45 |\n")
    assert measure.main(["--check"]).startswith("error: README.md has other figures than docs/measured")
    assert measure.main(["--read", "torch_peer"]) is None and "no figure changed" in capsys.readouterr().out
    monkeypatch.setitem(measure.TABLES, "torch_peer", dataclasses.replace(table, command="exit 3"))
    assert "torch_peer: its command ended with status 3" in measure.main(["torch_peer"])


def test_all_tables_are_listed_with_their_age_and_needs(capsys):
    assert measure.main(["--list"]) is None
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(listed) == sorted(path.stem for path in (SITE / "measured").glob("*.json"))
    assert listed["maxtext"].endswith("can't be made again by a command: its note says why")
    assert re.fullmatch(r"kernels +\d+ days +15 CPU-minutes, the extra tpu", listed["kernels"])


def test_the_readme_is_short_and_has_the_stored_tables():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert re.findall("<!-- measured (.*) -->", text) == list(front_page.TABLES)
    assert text == front_page.with_stored_tables(text), "run python docs/front_page.py"
    assert "| **VoCo-1 (one token)** | **95.9 %** | 99.2 % | 95.7 % | 95.3 % | 100.1 % |" in text.splitlines()
    drifted = text.replace("| **95.9 %** |", "| **96.9 %** |")
    assert drifted != text == front_page.with_stored_tables(drifted)


def test_every_dependency_has_a_line_in_the_readme():
    """A package of setup.py is named in the first column of the README's table of dependencies."""
    packages = set(re.findall(r'"([\w.-]+)(?:\[\w+\])?[><=]=[^"]*"', (ROOT / "setup.py").read_text()))
    assert {"orbax-checkpoint", "numba", "easy-vqa", "tqdm"} < packages
    table = (ROOT / "README.md").read_text().partition("## Dependencies")[2]
    named = set(re.findall(r"[\w-]+", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))))
    assert not packages - named


def text_of(page):
    """A page's Markdown; of a notebook, that of its cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose(page):
    """A page's Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def links(page):
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^()\s]+(?:\([^()]*\))?)\)", re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page):
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead(page):
    """The links of a page that lead nowhere in this checkout."""
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not re.match("https?:", link) and not (target.exists() and (not anchor or anchor in anchors(target))):
            yield link


def test_links_lead_somewhere(tmp_path):
    assert not {f"{page.name}: {link}" for page in LINKED for link in dead(page)}
    page = tmp_path / "page.md"
    page.write_text("# Kept: the `b` heading\n[a](#kept-the-b-heading) [b](#lost) [c](page.md) ![d](no.svg) `[e](f)`\n"
                    "```\n# [g](h)\n```\n[i](page.md#g) [j](https://arxiv.org)\n")
    assert list(dead(page)) == ["#lost", "no.svg", "page.md#g"]


@pytest.mark.slow
def test_links_to_other_sites_are_not_dead():
    """Only an answer that says that the page is gone fails; a site that cannot be reached does not."""
    gone, reached = [], 0
    for link in sorted({link for page in LINKED for link in links(page) if link.startswith("http")}):
        request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0"})
        try:
            urllib.request.urlopen(request, timeout=20).close()
        except urllib.error.HTTPError as error:
            gone += [link] if error.code in (404, 410) else []
        except OSError:
            continue
        reached += 1
    if not reached:
        pytest.skip("no site can be reached from here")
    assert not gone


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Upper Bound" in (tmp_path / "site" / "measured" / "index.html").read_text()


@pytest.mark.slow
def test_pictures_are_what_their_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SITE)
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    figures.main()
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in (SITE / "images").glob("*.svg")}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, tmp_path, trained):
    """Its blocks without a title, one after the other, where a quickstart has run."""
    shutil.copytree(trained, tmp_path / "runs" / "quickstart", symlinks=True)
    for name in ("launch", "vocojax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    code = [block for block in blocks(SITE / f"{page}.md") if not block.needs]
    assert code
    for language, run in (("bash", ["bash", "-euc"]), ("python", [sys.executable, "-c"])):
        text = "\n".join(block.code for block in code if block.language == language)
        active = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # as after activating
        done = subprocess.run([*run, text], cwd=tmp_path, capture_output=True, text=True, env=active)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quickstart of two steps."""
    pytest.importorskip("easy_vqa")
    from configs import quickstart
    from vocojax.experiments.quickstart import Quickstart

    workdir = tmp_path_factory.mktemp("trained")
    Quickstart(quickstart.get_config, workdir, steps=Tiny(), test_images=4).run()
    return workdir
