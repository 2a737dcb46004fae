"""What the machine is, as far as times depend on it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shiftadd_cli.version import __version__

# Taken where the machine does not say: larger than the last-level cache of most.
ASSUMED_CACHE_BYTES = 64 << 20
_ASSUMED_FREE_BYTES = 4 << 30

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """Attributes:
    cpu: the processor's name; cores: that this process may use; threads: that torch computes with.
    cache_bytes: of the last-level cache, None where the system does not say.
    """

    cpu: str
    cores: int
    threads: int
    cache_bytes: int | None

    @classmethod
    def this(cls, threads: int) -> Machine:
        """The machine this runs on."""
        return cls(_cpu_name(), _cores(), threads, last_level_cache())

    def to_dict(self) -> dict[str, Any]:
        versions = {"shiftadd-cli": __version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", "transformers")}
        return asdict(self) | {"versions": versions}


def last_level_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the cache of the highest level as Linux tells them below `root`; None elsewhere."""
    sizes: dict[int, int] = {}
    for folder in root.glob("index*"):
        level, size = folder / "level", folder / "size"
        if level.is_file() and size.is_file() and (found := re.fullmatch(r"(\d+)([KMG])", size.read_text().strip())):
            sizes[int(level.read_text())] = int(found[1]) * _UNITS[found[2]]
    return sizes[max(sizes)] if sizes else None


def free_memory() -> int:
    """Bytes that can be had without swapping; a cautious guess where the system does not say."""
    found = _proc_bytes("meminfo", "MemAvailable")
    return _ASSUMED_FREE_BYTES if found is None else found


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not say."""
    return _proc_bytes("self/status", "VmRSS")


def _proc_bytes(file: str, key: str) -> int | None:
    path = Path("/proc") / file
    found = re.search(rf"^{key}:\s*(\d+) kB", path.read_text(), flags=re.MULTILINE) if path.is_file() else None
    return None if found is None else 1024 * int(found[1])


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), flags=re.MULTILINE) if path.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    # Not cpu_count where this is known: containers are often given some of the machine's cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
