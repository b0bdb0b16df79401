"""The cluster's programs: built from Go modules of pinned versions, once, into the user's cache folder.

``<folder of go.mod>/go.mod`` pins a version and names the program as a ``tool``; ``go.sum`` holds the sources to it.
What is built lies under ``<cache>/programs/<module>-<hash of both and of how it is built>/``: another version never
meets an old program. A build that is killed leaves nothing that is taken for a program, and two at once build once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.errors import ClusterError

_HERE = Path(__file__).parent
_GO = (1, 26)

_KUBERNETES = "v1.34.4"
_KUBERNETES_FLAGS = " ".join(
    f"-X k8s.io/component-base/version.{name}={value}"
    for name, value in (("gitVersion", _KUBERNETES), ("gitMajor", "1"), ("gitMinor", "34"), ("gitTreeState", "clean"))
)
"""Without a version of this form, clients that parse it refuse the API server."""


@dataclass(frozen=True, slots=True)
class Program:
    """``package`` is built in the module ``module`` (a folder beside this file)."""

    name: str
    module: str
    package: str
    link_flags: str = ""


PROGRAMS: Final = {
    program.name: program
    for program in (
        Program("etcd", "tools", "go.etcd.io/etcd/server/v3"),
        *(
            Program(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", _KUBERNETES_FLAGS)
            for name in (
                "kube-apiserver",
                "kubectl",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
            )
        ),
        Program("pause", "tools", "./pause"),
        Program("kwok", "tools", "sigs.k8s.io/kwok/cmd/kwok"),
        Program("helm", "tools", "helm.sh/helm/v3/cmd/helm"),
        Program("kubeconform", "tools", "github.com/yannh/kubeconform/cmd/kubeconform"),
        Program("versitygw", "s3", "github.com/versity/versitygw/cmd/versitygw"),
        Program("coredns", "dns", "github.com/coredns/coredns"),
        Program("envoy-gateway", "gateway", "github.com/envoyproxy/gateway/cmd/envoy-gateway"),
    )
}
"""In the order in which they are built."""


def cache() -> Path:
    """Where what is dear to make is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "endcap" / "cluster"


def path(name: str) -> Path:
    """Where the program ``name`` lies once it is built."""
    program = PROGRAMS[name]
    return cache() / "programs" / f"{program.module}-{_key(program)}" / name


def built(names: Iterator[str] | tuple[str, ...]) -> bool:
    return all(path(name).exists() for name in names)


def why_not(names: tuple[str, ...]) -> str | None:
    """Why ``names`` cannot be had on this machine, in one line; None: they can."""
    if built(names):
        return None
    if shutil.which("go") is None:
        return f"Go {_GO[0]}.{_GO[1]} is not installed (the cluster's programs are built with it)"
    said = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=False).stdout.strip()
    version = tuple(int(part) for part in said.removeprefix("go").split(".")[:2] if part.isdigit())
    return None if version >= _GO else f"Go {_GO[0]}.{_GO[1]} is needed for the cluster's programs; found {said or '?'}"


def ensure(name: str) -> Path:
    """The program ``name``, built if it is not there yet.

    Raises:
        ClusterError: it cannot be built; the compiler's last words are in it.
    """
    wanted = path(name)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with locked(wanted.with_name(f".{name}.lock")):
        if not wanted.exists():
            _build(PROGRAMS[name], wanted)
    return wanted


@dataclass(frozen=True, slots=True)
class Documents:
    """YAML files that come with the module ``source`` of ``program``: those that match ``patterns``."""

    program: str
    source: str
    patterns: tuple[str, ...]


GATEWAY_CRDS: Final = Documents(
    "envoy-gateway", "github.com/envoyproxy/gateway", ("charts/gateway-helm/charts/crds/crds/**/*.yaml",)
)
"""Of the Gateway API and of Envoy Gateway itself."""

KWOK_STAGES: Final = Documents(
    "kwok",
    "sigs.k8s.io/kwok",
    (
        "kustomize/stage/node/fast/node-*.yaml",
        "kustomize/stage/node/heartbeat-with-lease/node-*.yaml",
        "kustomize/stage/pod/fast/pod-*.yaml",
    ),
)
"""What kwok makes of nodes and pods."""


def ensure_documents(documents: Documents) -> Path:
    """One file with all of ``documents``, kept beside their program.

    Raises:
        ClusterError: the module cannot be had.
    """
    program = PROGRAMS[documents.program]
    wanted = path(program.name).with_name(f"{program.name}-{_digest(repr(documents).encode())}.yaml")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with locked(wanted.with_name(f".{wanted.stem}.lock")):
        if not wanted.exists():
            asked = ("go", "mod", "download", "-json", documents.source)
            ended = subprocess.run(asked, cwd=_HERE / program.module, capture_output=True, text=True, check=False)
            if ended.returncode != 0:
                raise ClusterError(f"{' '.join(asked)} in {_HERE / program.module}: {ended.stderr.strip()}")
            root = Path(json.loads(ended.stdout)["Dir"])
            found = [file.read_text() for pattern in documents.patterns for file in sorted(root.glob(pattern))]
            unfinished = wanted.with_suffix(f".unfinished-{os.getpid()}")
            unfinished.write_text("\n---\n".join(found))
            unfinished.replace(wanted)
    return wanted


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """One holder at a time; let go of by the system when the holder dies."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _build(program: Program, wanted: Path) -> None:
    if reason := why_not((program.name,)):
        raise ClusterError(reason)
    print(f"building {program.name} (once; it is kept in {wanted.parent})", flush=True)  # noqa: T201
    for left in wanted.parent.glob(f".{program.name}.unfinished-*"):
        left.unlink()
    # A compiler whose caller was killed may still be writing: never into the same file.
    unfinished = wanted.with_name(f".{program.name}.unfinished-{os.getpid()}")
    ended = subprocess.run(
        [
            *("go", "build", "-trimpath", "-mod=readonly", "-buildvcs=false"),
            *("-ldflags", f"-s -w {program.link_flags}".strip(), "-o", str(unfinished), program.package),
        ],
        cwd=_HERE / program.module,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        last = "\n".join(ended.stderr.strip().splitlines()[-8:])
        raise ClusterError(f"{program.name} cannot be built in {_HERE / program.module}:\n{last}")
    unfinished.replace(wanted)


def _key(program: Program) -> str:
    parts = [(_HERE / program.module / name).read_bytes() for name in ("go.mod", "go.sum")]
    parts.append(program.link_flags.encode())
    if program.package.startswith("."):
        parts.append((_HERE / program.module / program.package / "main.go").read_bytes())
    return _digest(b"".join(parts))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def main() -> None:
    """Build the programs that are named; without names all of them."""
    for name in sys.argv[1:] or PROGRAMS:
        ensure(name)
    if not sys.argv[1:]:
        for documents in (GATEWAY_CRDS, KWOK_STAGES):
            ensure_documents(documents)


if __name__ == "__main__":
    main()
