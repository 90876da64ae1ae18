"""Runs `vocojax rehearse` of this checkout; --help describes it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vocojax.cli import rehearse, runner

if __name__ == "__main__":
    runner.run(rehearse)
