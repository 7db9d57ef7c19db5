"""What this machine computes on. Imports nothing that takes memory: benchmarks/run.py must stay small."""

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name, as /proc/cpuinfo has it on Linux."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
