#!/bin/sh
# Installs the torch that constraints.txt pins into the environment of the given Python, without its dependencies.
# PyPI's build for Linux brings several gigabytes of CUDA along, so without an NVIDIA driver the CPU build is taken:
# from wherever pip is set up to look, else from PyTorch's own index, else there is no choice left.
# usage: scripts/install_torch.sh PYTHON
set -eu

python=$1
version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)

install() {
    "$python" -m pip install --no-deps "$@"
}

if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    # Where pip's own sources do not have it, pip says so in red; that is expected here and nothing to worry anybody.
    if install --quiet "torch==$version+cpu" 2>/dev/null; then
        exit 0
    fi
    if install --retries 2 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu"; then
        exit 0
    fi
    echo "No CPU build of torch $version is within reach; taking PyPI's, which may bring CUDA along (gigabytes)." >&2
fi
install "torch==$version"
