"""Runs `vocojax kernel_report` of this checkout; --help describes it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vocojax.cli import kernel_report, runner

if __name__ == "__main__":
    runner.run(kernel_report)
