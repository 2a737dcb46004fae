"""The properties of the machine that times depend on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shiftadd_cli.version import __version__

# Assumed if the system does not report it: larger than most last-level caches.
ASSUMED_CACHE_BYTES = 64 << 20
_ASSUMED_FREE_BYTES = 4 << 30

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """Attributes:
    cpu: the processor's name; cores: cores available to this process; threads: torch's threads.
    cache_bytes: size of the last-level cache, None if the system does not report it.
    """

    cpu: str
    cores: int
    threads: int
    cache_bytes: int | None

    @classmethod
    def this(cls, threads: int) -> Machine:
        """The machine that this process runs on."""
        return cls(_cpu_name(), _cores(), threads, last_level_cache())

    def to_dict(self) -> dict[str, Any]:
        versions = {"shiftadd-cli": __version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", "transformers")}
        return asdict(self) | {"versions": versions}


def last_level_cache(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the last-level cache, as Linux reports them below `root`; None on other systems."""
    sizes: dict[int, int] = {}
    for folder in root.glob("index*"):
        level, size = folder / "level", folder / "size"
        if level.is_file() and size.is_file() and (match := re.fullmatch(r"(\d+)([KMG])", size.read_text().strip())):
            sizes[int(level.read_text())] = int(match[1]) * _UNITS[match[2]]
    return sizes[max(sizes)] if sizes else None


def free_memory() -> int:
    """Bytes available without swapping; a cautious guess if the system does not report them."""
    nbytes = _proc_bytes("meminfo", "MemAvailable")
    return _ASSUMED_FREE_BYTES if nbytes is None else nbytes


def resident_memory() -> int | None:
    """Resident bytes of this process; None if the system does not report them."""
    return _proc_bytes("self/status", "VmRSS")


def _proc_bytes(file: str, key: str) -> int | None:
    path = Path("/proc") / file
    match = re.search(rf"^{key}:\s*(\d+) kB", path.read_text(), flags=re.MULTILINE) if path.is_file() else None
    return None if match is None else 1024 * int(match[1])


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), flags=re.MULTILINE) if path.is_file() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cores() -> int:
    # Preferred over cpu_count, since containers often get only some of the machine's cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
