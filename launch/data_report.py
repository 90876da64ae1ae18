"""Runs `vocojax data_report` of this checkout; --help describes it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vocojax.cli import data_report, runner

if __name__ == "__main__":
    runner.run(data_report)
