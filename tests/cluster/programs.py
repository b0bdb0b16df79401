"""The cluster's programs: built from Go modules of pinned versions, once, into the user's cache folder.

``<folder of go.mod>/go.mod`` pins a version and names the program as a ``tool``; ``go.sum`` holds the sources to it.
What is built lies under ``<cache>/programs/<module>-<hash of both and of how it is built>/``: another version never
meets an old program. A build that is killed leaves nothing that is taken for a program, and two at once build once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
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


def ensure_gateway_crds() -> Path:
    """The folder of the Gateway API's and Envoy Gateway's own CRDs, which come with its module."""
    program = PROGRAMS["envoy-gateway"]
    wanted = path(program.name).with_name("crds")
    wanted.parent.mkdir(parents=True, exist_ok=True)
    with locked(wanted.with_name(".crds.lock")):
        if not wanted.exists():
            asked = ("go", "list", "-mod=readonly", "-m", "-f", "{{.Dir}}", "github.com/envoyproxy/gateway")
            subprocess.run(["go", "mod", "download", asked[-1]], cwd=_HERE / program.module, check=True)
            said = subprocess.run(asked, cwd=_HERE / program.module, capture_output=True, text=True, check=True).stdout
            unfinished = wanted.with_name(".crds.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for file in sorted((Path(said.strip()) / "charts/gateway-helm/charts/crds/crds").rglob("*.yaml")):
                (unfinished / file.name).write_bytes(file.read_bytes())
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
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        digest.update((_HERE / program.module / name).read_bytes())
    digest.update(program.link_flags.encode())
    if program.package.startswith("."):
        digest.update((_HERE / program.module / program.package / "main.go").read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Build everything."""
    for name in PROGRAMS:
        ensure(name)
    ensure_gateway_crds()


if __name__ == "__main__":
    main()
