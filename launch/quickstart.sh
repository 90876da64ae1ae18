#!/usr/bin/env bash
# Makes .venv, installs vocojax, trains every row of the retention table on easy-VQA and prints it; with --video, of the
# table about time; with --mosaic, of the tables of a harder task.
#   bash launch/quickstart.sh [--seeds 0,1,2] [--full] [--video | --mosaic] [--json] [--workdir DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: vocojax needs Python >= 3.11, $PYTHON is $("$PYTHON" --version); set PYTHON to a newer one" >&2; exit 1; }
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
# Quiet twice: errors only, without warnings about where scripts are put.
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint requirements.lock \
    --editable '.[quickstart]'
exec .venv/bin/python launch/quickstart.py "$@"
