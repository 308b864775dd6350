#!/usr/bin/env bash
# Builds and installs onedl-mmcv with its compiled operators: bash tools/build_mmcv.sh [PYTHON]
#
# It ships as source and has to compile against the very torch that will load it, which pip's isolated build does not
# do. Where the operators load already, nothing is built. Environment variables:
#   MAX_JOBS=N    compile N files at a time (as many as there are cores, and 2 GiB of memory for each)
#   FORCE_CUDA=1  build the CUDA operators where no GPU is seen, as for a container image
#   CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST  as torch reads them
set -euo pipefail

python=${1:-python}
constraints=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/constraints.txt

say() { echo "build_mmcv: $*"; }
die() {
    say "$*" >&2
    exit 1
}

# Loads the operators without the rest of mmcv, whose own requirements need not be there yet, and calls one.
operators_load() {
    "$python" - "$ops" 2>/dev/null <<'PYTHON'
import importlib.util
import sys
import types

import torch

found = importlib.util.find_spec("mmcv")
sys.modules["mmcv"] = package = types.ModuleType("mmcv")
package.__path__ = found.submodule_search_locations if found else []
from mmcv import _ext

wants_cuda = sys.argv[1] != "cpu"
device = "cuda" if wants_cuda and torch.cuda.is_available() else "cpu"
_ext.nms(torch.tensor([[0.0, 0.0, 2.0, 2.0]], device=device), torch.tensor([0.5], device=device), 0.5, 0)
sys.exit(wants_cuda and _ext.get_compiling_cuda_version() == "not available")
PYTHON
}

install() {
    "$python" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall \
        --constraint "$constraints" "${caching[@]}" onedl-mmcv
}

# Writes a compiler that takes C++17 for C++20.
with_cxx20() { # COMPILER FILE
    printf '#!/usr/bin/env bash\nexec %s "${@/#-std=c++17/-std=c++20}"\n' "$1" >"$2"
    chmod +x "$2"
}

command -v "$python" >/dev/null || die "no Python named $python: give one to install into, tools/build_mmcv.sh PYTHON"
facts=$("$python" - 2>&1 <<'PYTHON'
import os
import re
import sysconfig
from importlib.metadata import distributions

import torch

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
standard = 20 if [int(number) for number in re.findall(r"\d+", torch.__version__)[:2]] >= [2, 14] else 17
names = {distribution.metadata["Name"] for distribution in distributions()}
original = next((name for name in ("mmcv", "mmcv-full", "mmcv-lite") if name in names), "-")
gpu = torch.cuda.is_available() and torch.version.cuda is not None
jobs = max(1, min(cores, memory // 2**31))
include = sysconfig.get_path("include")
print(torch.__version__, torch.version.cuda or "none", int(gpu), standard, jobs, original, include)
PYTHON
) || die "torch does not import in $python (${facts##*$'\n'}): install it there first, pip install torch torchvision"
read -r torch torch_cuda gpu standard jobs original include <<<"${facts##*$'\n'}"

ops=cpu
if [[ $gpu == 1 || ${FORCE_CUDA:-0} == 1 ]]; then
    nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
    nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
    nvcc_cuda=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p' || true)
    if [[ -n $nvcc_cuda && ${nvcc_cuda%%.*} == "${torch_cuda%%.*}" ]]; then
        ops=cuda$nvcc_cuda
    elif [[ ${FORCE_CUDA:-0} == 1 ]]; then
        die "FORCE_CUDA=1, but the CUDA of nvcc is ${nvcc_cuda:-missing} and that of torch $torch is $torch_cuda: set" \
            "CUDA_HOME to a toolkit of torch's CUDA"
    else
        say "torch sees a GPU, but the CUDA of nvcc is ${nvcc_cuda:-missing} and that of torch $torch is $torch_cuda:" \
            "the operators will run on the CPU only; set CUDA_HOME to a toolkit of torch's CUDA for those of the GPU"
    fi
fi

if operators_load; then
    say "mmcv's operators work with torch $torch ($ops): nothing to build"
    exit 0
fi

[[ $original == - ]] || die "$original is installed, which provides mmcv too: first $python -m pip uninstall $original"
[[ -f $include/Python.h ]] || die "no $include/Python.h: install the headers of this Python (Debian: python3-dev)"
compiler=${CXX:-c++}
command -v "${compiler%% *}" >/dev/null || die "no C++ compiler ${compiler%% *}: install one (Debian: g++) or set CXX"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ $standard == 20 ]]; then # mmcv's setup.py asks for C++17 whatever torch's headers need
    with_cxx20 "$compiler" "$scratch/c++"
    export CXX=$scratch/c++
fi
if [[ $ops == cpu ]]; then
    export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES= # or setup.py would build the CUDA operators wherever torch sees a GPU
else
    CUDA_HOME=$(cd "$(dirname "$nvcc")/.." && pwd)
    export FORCE_CUDA=1 CUDA_HOME
    if [[ $standard == 20 ]]; then
        with_cxx20 "$nvcc" "$scratch/nvcc"
        export PYTORCH_NVCC=$scratch/nvcc
    fi
fi
export MAX_JOBS=${MAX_JOBS:-$jobs}

# pip would take a wheel that it built for another torch, so each torch has a cache of its own.
if cache=$("$python" -m pip cache dir 2>/dev/null); then
    cache+=/onedl-mmcv/torch-$torch-$ops
    kept=$(find "$cache" -name '*.whl' 2>/dev/null || true)
    caching=(--cache-dir "$cache")
else
    kept=
    caching=(--no-cache-dir)
fi

if [[ -z $kept ]]; then
    say "compiling mmcv for torch $torch ($ops, C++$standard, $MAX_JOBS files at a time), once: pip keeps the wheel" \
        "for other environments with this torch"
    say "it takes about $((24 / MAX_JOBS + 1)) minutes on $MAX_JOBS idle cores, and far longer for a GPU"
fi
started=$SECONDS
"$python" -m pip install --quiet --disable-pip-version-check 'setuptools>=77,<81' wheel ninja packaging
install
if [[ -n $kept ]] && ! operators_load; then
    say "the wheel that pip kept does not load with torch $torch: compiling it anew"
    rm -r "$cache"
    install
fi
operators_load || die "mmcv's operators do not load with torch $torch: $python -c 'import torch, mmcv._ext' says why"
took=$((SECONDS - started))
say "mmcv's operators work with torch $torch ($ops), after $((took / 60)) min $((took % 60)) s"
