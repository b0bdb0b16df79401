"""Which registry a command means: a URI, or the folder of an embedded one."""

from __future__ import annotations

from pathlib import Path

from endcap.registry import Registry, sqlite_uri

__all__ = ["open_registry"]


def open_registry(named: str) -> Registry:
    """The registry of a tracking URI, or of a folder with an embedded one (sqlite and artifacts)."""
    return Registry(named if "://" in named else sqlite_uri(Path(named)))
