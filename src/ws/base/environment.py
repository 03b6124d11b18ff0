"""What results depend on besides settings and inputs: versions, platform and processor. No host name, no user name."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ws.base.version import __version__

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "scipy", "polars", "gguf")
"""Packages whose version can change results."""


@cache
def described() -> Mapping[str, Any]:
    """Versions of this package, of Python and of `PACKAGES`; system, processor, accelerator and number of threads."""
    import torch  # noqa: PLC0415 - heavy import, late

    return {
        "weight-steering": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, as `torch 2.9.0 and 2.10.0`."""
    first, second = ({**some, **some.get("packages", {}), "packages": None} for some in (one, other))
    return [
        f"{name} {first.get(name)} and {second.get(name)}"
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    ]


def without_home(content: Any) -> Any:
    """JSON-like content with the user's home folder written as `~`, because its path holds the user's name."""
    home = str(Path.home())
    if isinstance(content, Mapping):
        return {name: without_home(part) for name, part in content.items()}
    if isinstance(content, list | tuple):
        return [without_home(part) for part in content]
    if isinstance(content, str) and len(home) > 1 and (content == home or content.startswith(f"{home}/")):
        return f"~{content[len(home) :]}"
    return content


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The name of the processor; only Linux tells it in a file."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
