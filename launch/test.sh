#!/usr/bin/env bash
# Makes .venv, installs what the tests need, checks style and types, and runs the tests.
#   bash launch/test.sh [--all] [pytest arguments]       --all includes the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
SELECT=(-m "not slow")
if [ "${1:-}" = "--all" ]; then SELECT=(); shift; fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
    --editable '.[quickstart,tpu,test]'
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "${SELECT[@]}" "$@"
