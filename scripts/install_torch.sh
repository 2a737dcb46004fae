#!/bin/sh
# Installs the torch that constraints.txt pins into the environment of the given Python, without its dependencies.
# PyPI's build for Linux includes several gigabytes of CUDA, so without an NVIDIA driver the CPU build is installed:
# from pip's configured indexes, else from PyTorch's own index. If both fail, PyPI's build is installed.
# usage: scripts/install_torch.sh PYTHON
set -eu

python=$1
version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)

install() {
    "$python" -m pip install --no-deps "$@"
}

if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    # If the configured indexes lack it, pip prints an error; that is expected, so it is hidden.
    if install --quiet "torch==$version+cpu" 2>/dev/null; then
        exit 0
    fi
    if install --retries 2 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu"; then
        exit 0
    fi
    echo "No CPU build of torch $version is reachable; installing PyPI's, which may include CUDA (gigabytes)." >&2
fi
install "torch==$version"
