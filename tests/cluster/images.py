"""Our own images, built without a Docker engine: buildah in a changed root, on a base made by debootstrap.

An image is built anew when its Containerfile, its lock file, what it copies or the base's recipe changes; until then it
lies in the user's cache.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.cluster import archives, programs
from tests.cluster.errors import ClusterError

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_CONTAINERFILE = "images/Containerfile"

ROLES: Final = ("server", "controller", "load", "drills", "mlflow", "pipeline")
"""Targets of ``images/Containerfile``."""

STORAGE_INITIALIZER: Final = "storage-initializer"
"""KServe's own: an image of the tests', from the package that KServe's is made of."""
REDIS: Final = "redis"
"""Of this machine's Redis."""

_BASE = ("bookworm", "python3,python3-venv,ca-certificates")
_BASE_DROPS = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
)
"""Not in the base: what only a person at a terminal reads, or a package manager."""

_APART = ("unshare", "--mount", "--propagation=private")

_KEPT = 4
"""Of each role, the newest images."""

_LARGE = ("pipeline",)
"""Of these nothing but the image itself is kept: not its layers, not its wheels."""

NEEDED = ("buildah", "debootstrap")


def name(role: str) -> str:
    """As pods say it."""
    return f"docker.io/endcap/{role}:test"


def why_not() -> str | None:
    """Why this machine can build no image, in one line; None: it can."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    return (
        f"building images needs {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}"
        if missing
        else None
    )


def ensure(role: str) -> Path:
    """The docker-archive of the image of ``role``, built if it is not there yet.

    Raises:
        ClusterError: it cannot be built, with what the builder said last.
    """
    if role == REDIS:
        return archives.archive(name(role), archives.redis())
    wanted = _folder() / f"{role}-{_key(role)}.tar"
    with programs.locked(_folder() / f".{role}.lock"):
        if not wanted.exists():
            if (reason := why_not()) is not None:
                raise ClusterError(reason)
            print(f"building the image {role} (once; it is kept in {wanted.parent})", flush=True)  # noqa: T201
            _build(role, _base(), _wheels(role), wanted)
    return wanted


def package_image(folder: Path, image: str, to: Path) -> Path:
    """A model package as an image called ``image``, built as a user does (``images/package``); in the archive ``to``.

    Raises:
        ClusterError: it cannot be built, with what the builder said last.
    """
    base = archives.archive(archives.SHELL_IMAGE, archives.shell())
    with tempfile.TemporaryDirectory(prefix="endcap-package-image-", dir=_folder()) as scratch:
        buildah = (*_APART, "buildah", "--root", f"{scratch}/root", "--runroot", f"{scratch}/run")
        known = ("--storage-driver", "overlay")
        _run(*buildah, *known, "pull", f"docker-archive:{base}")
        _run(
            *(*buildah, *known, "build", "--isolation", "chroot", "--pull-never", "--format", "docker"),
            *("--build-arg", f"BASE={archives.SHELL_IMAGE}", "--file", str(_ROOT / "images/package/Containerfile")),
            *("--tag", image, str(folder)),
        )
        _run(*buildah, *known, "push", image, f"docker-archive:{to}:{image}")
    return to


def recipe(role: str) -> str:
    """What of its Containerfile makes the image of ``role``: the stages that all share, and its own."""
    if role == STORAGE_INITIALIZER:
        return _containerfile(role).read_text()
    stages = re.split(r"^(?=FROM )", _containerfile(role).read_text(), flags=re.MULTILINE)
    named = [(re.search(r"^FROM .* AS (\w+)$", stage, re.MULTILINE), stage) for stage in stages]
    return "".join(stage for name, stage in named if name is None or name[1] in ("packages", "role", role))


def _containerfile(role: str) -> Path:
    return _HERE / "storage_initializer" / "Containerfile" if role == STORAGE_INITIALIZER else _ROOT / _CONTAINERFILE


def _lock(role: str) -> Path:
    return _ROOT / "locks" / ("kserve-storage.txt" if role == STORAGE_INITIALIZER else f"{role}.txt")


def _build(role: str, base: Path, wheels: Path, wanted: Path) -> None:
    settings = _folder() / f".{role}-pip.conf"
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n")
    unfinished = wanted.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        if not _built_into(_store(role, base, wheels), role, base, wheels, settings, unfinished):
            raise ClusterError(f"the image {role} was not written to {unfinished}")
        unfinished.replace(wanted)
    finally:
        unfinished.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)
        for kept in (_store(role, base, wheels), wheels) if role in _LARGE else ():
            shutil.rmtree(kept, ignore_errors=True)
    # Other checkouts have theirs, and may be reading them now.
    for old in sorted(_folder().glob(f"{role}-*.tar"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
        old.unlink()


def _store(role: str, base: Path, wheels: Path) -> Path:
    """Where buildah keeps the layers of a role's packages between builds; another lock or base begins a new one."""
    wanted = _folder() / f"store-{role}-{_hash(f'{base.name} {wheels.name}'.encode())}"
    for old in _folder().glob(f"store-{role}-*"):
        if old != wanted:
            shutil.rmtree(old, ignore_errors=True)
    return wanted


def _built_into(store: Path, role: str, base: Path, wheels: Path, settings: Path, to: Path) -> bool:
    # With mounts of its own, and nothing remembered of those of a build that was killed.
    shutil.rmtree(store / "run", ignore_errors=True)
    buildah = (*_APART, "buildah", "--root", str(store / "root"), "--runroot", str(store / "run"))
    known = ("--storage-driver", "overlay")
    _run(*buildah, *known, "pull", f"docker-archive:{base}")
    _run(
        *(*buildah, *known, "build", "--isolation", "chroot", "--pull-never", "--format", "docker"),
        *(() if role in _LARGE else ("--layers",)),
        # The packages come from this machine's folder: the builder needs no network and no certificates.
        *("--volume", f"{wheels}:/wheels:ro", "--volume", f"{settings}:/etc/pip.conf:ro"),
        *("--build-arg", f"BASE={_BASE_NAME}", "--build-arg", f"LOCK={_lock(role).stem}"),
        *(() if role == STORAGE_INITIALIZER else ("--target", role)),
        *("--file", str(_containerfile(role)), "--tag", name(role), str(_ROOT)),
    )
    _run(*buildah, *known, "push", name(role), f"docker-archive:{to}:{name(role)}")
    return to.exists()


_BASE_NAME = "localhost/endcap-test-base:latest"


def _base() -> Path:
    """A Debian with Python, as a docker-archive."""
    wanted = _folder() / f"base-{_hash(repr((_BASE, _BASE_DROPS)).encode())}.tar"
    with programs.locked(_folder() / ".base.lock"):
        if not wanted.exists():
            tree = _folder() / ".base-tree"
            shutil.rmtree(tree, ignore_errors=True)
            # With mounts of its own: it mounts /proc, and may be killed.
            _run(
                *_APART,
                "debootstrap",
                "--variant=minbase",
                f"--include={_BASE[1]}",
                _BASE[0],
                str(tree),
            )
            for dropped in _BASE_DROPS:
                shutil.rmtree(tree / dropped, ignore_errors=True)
                (tree / dropped).mkdir()
            unfinished = wanted.with_suffix(".unfinished")
            archives.write_folder(unfinished, _BASE_NAME, tree)
            unfinished.replace(wanted)
            shutil.rmtree(tree)
    return wanted


def _wheels(role: str) -> Path:
    """A folder with every file that the role's lock names."""
    lock = _lock(role)
    wanted = _folder() / f"wheels-{role}-{_hash(lock.read_bytes())}"
    if not wanted.exists():
        unfinished = _folder() / f".wheels-{role}"
        shutil.rmtree(unfinished, ignore_errors=True)
        # The base's Python may be an earlier 3.11 than this one: what only that needs is fetched too.
        for_both = _folder() / f".{role}-lock.txt"
        for_both.write_text(re.sub(r" ; python_full_version < '3\.11\.\d+'", "", lock.read_text()))
        pip = _ROOT / ".tools" / "bin" / "python"
        _run(
            *(
                str(pip if pip.exists() else sys.executable),
                "-m",
                "pip",
                "download",
                "-q",
                "--disable-pip-version-check",
            ),
            *("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(for_both), "-d", str(unfinished)),
        )
        for_both.unlink()
        for old in _folder().glob(f"wheels-{role}-*"):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.replace(wanted)
    return wanted


def _key(role: str) -> str:
    digest = hashlib.sha256(repr((_BASE, _BASE_DROPS)).encode())
    digest.update(recipe(role).encode())
    for file in (_ROOT / ".containerignore", _lock(role), *_copied(role)):
        digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _copied(role: str) -> Iterator[Path]:
    """The files that its stages copy, but for the lock."""
    for source in re.findall(r"^COPY (\w+) ", recipe(role), re.MULTILINE):
        path = _ROOT / source
        yield from sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def unpacked_bytes(archive: Path) -> int:
    """How much the files of an image take, as its layers say."""
    return sum(entry.size for entry in _entries(archive) if entry.isfile())


def packages(archive: Path) -> set[str]:
    """The Python packages in an image, by their folders' names."""
    found = (re.search(r"site-packages/(\w+)/", entry.name) for entry in _entries(archive))
    return {match[1] for match in found if match}


def _entries(archive: Path) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(archive) as outer:
        for member in outer:
            if member.isfile() and member.name.endswith(".tar"):
                layer = outer.extractfile(member)
                assert layer is not None
                with tarfile.open(fileobj=layer) as inner:
                    yield from inner


def _folder() -> Path:
    folder = programs.cache() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _run(*command: str) -> None:
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode != 0:
        raise ClusterError(
            f"{' '.join(_shown(command))} failed:\n" + "\n".join(ended.stdout.strip().splitlines()[-15:])
        )


def _shown(command: Sequence[str]) -> Sequence[str]:
    return [*command[:8], "..."] if len(command) > 8 else command


def main() -> None:
    """Build the images of the roles that are named (default: server and controller)."""
    for role in sys.argv[1:] or ("server", "controller"):
        print(ensure(role))  # noqa: T201


if __name__ == "__main__":
    main()
