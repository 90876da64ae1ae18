"""The wheel of this checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def build_wheel(directory: Path) -> Path:
    """Builds the wheel in a directory and returns its path; the checkout stays as it is."""
    source = directory / "source"
    for name in ("vocojax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source],
                   check=True)
    (wheel,) = directory.glob("vocojax-*.whl")
    return wheel
