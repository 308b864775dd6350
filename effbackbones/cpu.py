"""What Linux says of the CPU."""

from pathlib import Path


def cpu_field(key: str) -> str:
    """Return what /proc/cpuinfo has of the first processor under a key, as `model name`; empty where it has none."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
