#!/usr/bin/env bash
# Collects every wheel that fedloom needs into one folder, for machines without internet.
#
#   containers/wheelhouse.sh [--extras LIST] [--check] FOLDER
#
# Runs where pip reaches an index, on the kind of machine and the Python that the wheels are for. Packages that the index
# has as sources only are built here. The versions are those of constraints.txt. With --check the folder is installed
# into a fresh environment with the index switched off, which is thrown away again.
# The images are installed from such folders; for them what fedloom needs and fedloom itself are collected apart (--only
# dependencies, --only fedloom), so that a change of fedloom's own code does not collect everything again.
set -euo pipefail
shopt -s nullglob

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
extras=distributed,privacy,zstd,lz4
only=
check=
folder=

refuse() {
    echo "wheelhouse.sh: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --extras) extras=${2?wheelhouse.sh: --extras needs a list, such as distributed,zstd}; shift 2 ;;
        --only) only=${2?wheelhouse.sh: --only needs dependencies or fedloom}; shift 2 ;;
        --check) check=yes; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) refuse "there is no option $1: take --extras, --check or --help" ;;
        *) [ -z "$folder" ] || refuse "one folder is expected, and $folder and $1 were given"; folder=$1; shift ;;
    esac
done
[ -n "$folder" ] || refuse "name the folder to fill: containers/wheelhouse.sh wheelhouse"
case $only in '' | dependencies | fedloom) ;; *) refuse "--only $only: take dependencies or fedloom" ;; esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    refuse "$python is no Python 3.11 or newer: name one with PYTHON=…"
"$python" -m pip --version >/dev/null 2>&1 || refuse "$python has no pip: name another one with PYTHON=…"
if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ]; then
    refuse "$folder is not empty: name a new folder, so that no version is in it twice"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip=("$python" -m pip --disable-pip-version-check)
if [ "$only" != fedloom ]; then
    "$python" "$here/requirements.py" ${extras//,/ } ${only:+build} >"$work/requirements.txt"
    "${pip[@]}" wheel -qq --use-pep517 --no-cache-dir -c "$root/constraints.txt" -r "$work/requirements.txt" -w "$work/wheels"
fi
if [ "$only" != dependencies ]; then
    "${pip[@]}" wheel -qq --use-pep517 --no-cache-dir --no-deps -c "$root/constraints.txt" -w "$work/wheels" "$root"
fi
mkdir -p "$folder"
cp "$root/constraints.txt" "$work"/wheels/*.whl "$folder/"
chmod 644 "$folder"/*
(cd "$folder" && sha256sum constraints.txt *.whl >SHA256SUMS)

if [ -n "$check" ]; then
    "$python" -m venv "$work/venv"
    # No configuration file and no variable of pip's can bring an index back in.
    env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 \
        "$work/venv/bin/python" -m pip install --quiet --no-cache-dir --no-index --find-links "$folder" \
        -c "$folder/constraints.txt" "fedloom[$extras]"
    "$work/venv/bin/python" -m pip check
    (cd "$work" && "$work/venv/bin/fedloom" --version)
fi
printf '%s wheels, %s: %s\n' "$(ls "$folder"/*.whl | wc -l)" "$(du -sh "$folder" | cut -f1)" "$folder"
printf 'install  pip install --no-index --find-links %s -c %s/constraints.txt "fedloom[%s]"\n' "$folder" "$folder" "$extras"
