"""What was measured on, and in which versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "eventbus", "faststream", "aio-pika", "aiormq", "pamqp", "taskiq", "taskiq-aio-pika", "celery", "kombu", "dramatiq",
    "pika", "uvloop", "pydantic", "opentelemetry-sdk",
)  # fmt: skip


def machine() -> dict[str, object]:
    """The computer, without anything that names it."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": round(os.getloadavg()[0], 1),
    }


def versions(broker: str, *, has_client: bool) -> dict[str, str]:
    """Of everything that takes part."""
    found = {"python": platform.python_version(), "rabbitmq": broker}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | ({"librabbitmq": _librabbitmq()} if has_client else {})


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _librabbitmq() -> str:
    try:
        said = subprocess.run(["pkg-config", "--modversion", "librabbitmq"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return said.stdout.strip() or "unknown"
