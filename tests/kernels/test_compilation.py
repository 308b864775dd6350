"""Triton's compiler takes the kernels: its interpreter, which the other tests use, takes more than that."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from triton.runtime.jit import KernelInterface

from effbackbones.kernels import aggregated_attention, super_tokens, window_attention

SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on the GPUs that are compiled for."""


def test_every_kernel_compiles_for_a_gpu_and_fits():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_for_gpu.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(each["binary"] > 0 and each["shared"] <= SHARED for each in found), found
    launched = {
        name
        for module in (aggregated_attention, super_tokens, window_attention)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and re.search(rf"^ +{name}\[", Path(module.__file__).read_text(), re.M)
    }
    assert launched == {each["kernel"] for each in found}
