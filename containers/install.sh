#!/bin/sh
# Installs fedloom's requirements with the named extras from the collected wheels: install.sh [EXTRA …]. No index is asked.
set -eu

[ -x /opt/fedloom/bin/python ] || python3 -m venv /opt/fedloom
python3 "$(dirname "$0")/requirements.py" "$@" >/tmp/requirements.txt
/opt/fedloom/bin/python -m pip --disable-pip-version-check install --quiet --no-cache-dir --no-index \
    --find-links /run/wheels -c /run/wheels/constraints.txt -r /tmp/requirements.txt
rm /tmp/requirements.txt
