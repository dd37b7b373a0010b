# Sourced by the launch scripts: a virtual environment in .venv with megalite installed.
# Idempotent; does nothing when setup.py has not changed since the last time.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# prepare EXTRAS: make .venv and install megalite with these extras into it, in place.
prepare() {
    local extras=$1 python=${PYTHON:-python3} stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "launch: $python is missing or older than Python 3.11; install one, or name it: PYTHON=python3.12 $0" >&2
        exit 2
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "launch: creating .venv" >&2
        if ! "$python" -m venv .venv; then
            echo "launch: $python cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
            exit 2
        fi
    fi
    stamp=$(cksum setup.py | cut -d' ' -f1)
    if [ "$(cat ".venv/installed-$extras" 2>/dev/null)" != "$stamp" ]; then
        echo "launch: installing megalite[$extras] (once)" >&2
        # Without an NVIDIA driver the CUDA build is gigabytes for nothing: a release by name, so that pip takes
        # its CPU build where an index has one (see the README). For tests the Triton that the kernels' tile
        # tables were made with; its interpreter reads numpy arrays as before 2.4.
        if ! command -v nvidia-smi >/dev/null && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
            .venv/bin/pip install -q --disable-pip-version-check torch==2.13.0
        fi
        if [ "$extras" = dev ] && ! command -v nvidia-smi >/dev/null; then
            .venv/bin/pip install -q --disable-pip-version-check triton==3.6.0 'numpy<2.4'
        fi
        .venv/bin/pip install -q --disable-pip-version-check -e ".[$extras]"
        echo "$stamp" >".venv/installed-$extras"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
