"""What this machine has: versions, devices, attention backends, the operators of mmcv."""

import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from effbackbones.layers import attention_report

PACKAGES = (
    *("effbackbones", "torch", "torchvision", "numpy", "pillow", "timm", "lightning", "omegaconf", "pyyaml"),
    *("torchmetrics", "safetensors", "matplotlib", "contourpy", "xformers"),
    *("tensorboard", "wandb", "webdataset", "datasets", "peft"),
    *("onnx", "onnxruntime", "onnxscript"),
    *("onedl-mmcv", "onedl-mmengine", "onedl-mmdetection", "onedl-mmsegmentation"),
)

MALICIOUS = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Releases that were published with malicious code: they must not stay installed."""

OPENMMLAB = {
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-full", "mmcv-lite"),
    "mmengine": ("onedl-mmengine", "mmengine", "mmengine-lite"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
}
"""The packages that provide each import name of OpenMMLab: the maintained line first, then the original ones."""

PIP = f"{sys.executable} -m pip"
BUILD_MMCV = f"`bash tools/build_mmcv.sh {sys.executable}`"
INSTALL_MM = f"`{PIP} install -e '.[mm]'`"
"""What installs mm, each from the root of a clone."""

USE_OPERATORS = """
import sys, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
try:
    from mmcv.ops import nms
    nms(torch.tensor([[0.0, 0.0, 2.0, 2.0]], device=device), torch.tensor([0.5], device=device), 0.5)
except Exception as error:
    sys.exit(f"{type(error).__name__}: " + str(error).partition("\\n")[0])
"""

CUDA_BUILD = f"set CUDA_HOME to a toolkit of CUDA {torch.version.cuda}, then"
OPERATOR_ADVICE = {
    r"No module named 'mmcv\._ext'": f"mmcv was installed without them; {BUILD_MMCV} builds them",
    r"No module named": f"{INSTALL_MM} installs what is missing",
    r"lib(GL|glib|gthread|SM|X)": "OpenCV needs this system library; install it (Debian: libgl1 libglib2.0-0)",
    r"cannot open shared object|[Ss]ymbol|signal": f"they were built for another torch; {BUILD_MMCV} builds them anew",
    r"for device cuda": f"they were built without CUDA; {CUDA_BUILD} {BUILD_MMCV} builds them anew",
    r"": f"`{PIP} uninstall onedl-mmcv`, then {BUILD_MMCV}, builds them anew",
}
"""What to do about operators that fail with an error which matches: the first that does."""


def installed_versions() -> dict[str, str | None]:
    """Return the version of each package that the project may use, None where it is not installed.

    OpenMMLab's original packages are among them where they are installed.
    """
    originals = {name: _version(name) for _, *names in OPENMMLAB.values() for name in names}
    return {name: _version(name) for name in PACKAGES} | {name: found for name, found in originals.items() if found}


def operators_failure() -> str:
    """Return the error with which the operators of the installed mmcv fail on this machine (its GPU if any), or "".

    They are called in a process of their own: operators built for another torch may end it.
    """
    command = [sys.executable, "-c", USE_OPERATORS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "no answer within 120 seconds"
    if done.returncode < 0:
        return f"the process ended by signal {-done.returncode}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def problems(versions: dict[str, str | None], operators: str = "") -> list[str]:
    """Return what must be mended, a sentence each; empty where nothing must.

    Args:
        versions: the packages, as `installed_versions` returns them.
        operators: the error of mmcv's operators, as `operators_failure` returns it.
    """
    sentences = [
        f"{name} {found} is a malicious release: uninstall it at once, change what secrets this machine had, "
        f"and install {name}>=2.6.6"
        for name, found in versions.items()
        if (name, found) in MALICIOUS
    ]
    providers = {module: [name for name in names if versions.get(name)] for module, names in OPENMMLAB.items()}
    for module, names in providers.items():
        if len(names) > 1:
            install = BUILD_MMCV if module == "mmcv" else INSTALL_MM
            sentences.append(
                f"{' and '.join(names)} overwrite each other, for both provide `import {module}`: "
                f"`{PIP} uninstall {' '.join(names)}`, then {install}"
            )
    needing = [*providers["mmdet"], *providers["mmseg"]]
    if needing and not providers["mmcv"]:
        sentences.append(f"mmcv is missing, which {' and '.join(needing)} need: {BUILD_MMCV} builds and installs it")
    if operators:
        advice = next(text for pattern, text in OPERATOR_ADVICE.items() if re.search(pattern, operators))
        sentences.append(f"the operators of mmcv fail here ({operators}): {advice}")
    return sentences


def devices() -> list[str]:
    """Return a line for each device that training can use."""
    lines = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    return lines


def report() -> dict[str, dict[str, str]]:
    """Return all findings: section, then item, then what was found."""
    versions = installed_versions()
    has_mmcv = any(versions.get(name) for name in OPENMMLAB["mmcv"])
    failure = operators_failure() if has_mmcv else ""
    without_mmcv = f"not installed; detection and segmentation need them: {BUILD_MMCV}, then {INSTALL_MM}"
    return {
        "System": {"python": platform.python_version(), "platform": platform.platform()},
        "Packages": {name: found or "not installed" for name, found in versions.items()},
        "Devices": dict(line.split(": ", 1) for line in devices()),
        "Attention": attention_report(),
        "OpenMMLab": {"mmcv operators": (failure or "works") if has_mmcv else without_mmcv},
        "Problems": {str(i): text for i, text in enumerate(problems(versions, failure), 1)},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
