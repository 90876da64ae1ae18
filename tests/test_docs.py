"""The documentation: its commands exist, its code runs, its links lead somewhere, its figures are the stored ones."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image

from tests.test_quickstart import Tiny
from vocojax.cli.main import VERBS

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs"
PAGES = [*sorted(SITE.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
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


@pytest.mark.parametrize("path", sorted((SITE / "measured").glob("*.json")), ids=lambda path: path.stem)
def test_stored_figures_name_their_origin(path):
    entry = json.loads(path.read_text())
    assert {"title", "columns", "rows", "command", "machine", "date"} <= {key for key, value in entry.items() if value}
    assert all(len(row) == len(entry["columns"]) for row in entry["rows"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry["date"])


def test_tables_of_the_readme_are_the_stored_ones():
    """A row of figures in the README that is also stored is stored so."""
    stored = {tuple(row) for path in (SITE / "measured").glob("*.json") for row in json.loads(path.read_text())["rows"]}
    rows = [tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
            for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    first = {row[0] for row in stored}
    figures = [row for row in rows if row[0] in first and any(character.isdigit() for character in "".join(row[1:]))]
    assert figures and not [row for row in figures if row not in stored]


def test_links_of_the_front_page_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{page.name}: {target}"


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
        done = subprocess.run([*run, text], cwd=tmp_path, capture_output=True, text=True)
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
