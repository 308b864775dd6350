"""What this machine has: versions, devices, attention backends."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from effbackbones.layers import attention_report

PACKAGES = (
    *("effbackbones", "torch", "torchvision", "numpy", "pillow", "timm", "lightning", "omegaconf", "pyyaml"),
    *("torchmetrics", "safetensors", "matplotlib", "xformers", "tensorboard", "wandb", "webdataset", "datasets"),
    *("onnx", "onnxruntime", "onnxscript"),
    *("onedl-mmcv", "onedl-mmengine", "onedl-mmdetection", "onedl-mmsegmentation"),
)

MALICIOUS = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Releases that were published with malicious code: they must not stay installed."""


def installed_versions() -> dict[str, str | None]:
    """Return the version of each package that the project may use, None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def problems(versions: dict[str, str | None]) -> list[str]:
    """Return what must be mended, a sentence each; empty where nothing must."""
    return [
        f"{name} {found} is a malicious release: uninstall it at once, change what secrets this machine had, "
        f"and install {name}>=2.6.6"
        for name, found in versions.items()
        if (name, found) in MALICIOUS
    ]


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
    return {
        "System": {"python": platform.python_version(), "platform": platform.platform()},
        "Packages": {name: found or "not installed" for name, found in versions.items()},
        "Devices": dict(line.split(": ", 1) for line in devices()),
        "Attention": attention_report(),
        "Problems": {str(i): text for i, text in enumerate(problems(versions), 1)},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
