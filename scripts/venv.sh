#!/usr/bin/env bash
# Makes .venv and installs podtree into it (editable), with the exact versions of constraints.txt.
#
#   scripts/venv.sh run     podtree and what it needs
#   scripts/venv.sh bench   and what `make bench` measures with
#   scripts/venv.sh test    and the tools of `make test` and `make check`
#
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
what="${1:-run}"
venv=.venv

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

apt() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || return 1
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null 2>&1
}

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 /usr/bin/python3; do
        if new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

if [ ! -x $venv/bin/python3 ]; then
    if ! python="$(find_python)"; then
        apt python3 || true
        find_python >/dev/null || apt python3.11 || true
        python="$(find_python)" || {
            echo "podtree needs Python 3.11 or newer; found: $(python3 -V 2>&1). PYTHON=/path/to/python3 chooses one." >&2
            exit 1
        }
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        apt "python$version-venv" || {
            echo "$python has no venv module: install python$version-venv" >&2
            exit 1
        }
    fi
    "$python" -m venv $venv
fi

pip() { $venv/bin/python3 -m pip --disable-pip-version-check -qq "$@"; }

# The build backend comes from constraints.txt as well, so that nothing unpinned runs.
pip install -c constraints.txt setuptools wheel
pip install -c constraints.txt --no-build-isolation -e .
if [ "$what" = bench ]; then
    pip install -c constraints.txt --no-build-isolation -e '.[bench]'
fi
if [ "$what" = test ]; then
    pip install -c constraints.txt --no-build-isolation -e '.[dev,bench]' # arrays: interactive Python in a pod, too
fi
