"""Where something was measured. For lab/speedrun.py."""
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                           capture_output=True)
    return found.stdout.strip() or "unknown"


def machine() -> str:
    """The processor's name, and how many threads a run takes."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    threads = os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()
    return f"{name}, {threads} threads"
