"""One test cluster in one folder: up, down, status. What it is lies in the folder: any command finds it again."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from tests.cluster import archives, controlplane, images, namespaces, node, programs
from tests.cluster.access import Access
from tests.cluster.archives import ENVOY_IMAGE, PAUSE_IMAGE, SHUTDOWN_IMAGE
from tests.cluster.controlplane import ControlPlane, Ports
from tests.cluster.daemons import READY_S, Daemons
from tests.cluster.errors import ClusterError
from tests.cluster.namespaces import Namespaces, free_second
from tests.cluster.net import Net
from tests.cluster.node import NAME as NODE
from tests.cluster.node import Node
from tests.cluster.ports import free_ports
from tests.cluster.services import Services

FOLDER_SETTING = "ENDCAP_TEST_CLUSTER"

_NETS = (201, 216)
"""Full clusters have 10.201.0.0/16, 10.202.0.0/16, ...: the first that nobody on this machine has."""

_SERVICES = "10.96.0.0/16"
"""Where there is no node, nothing is routed there."""

_FULL = tuple(name for name in programs.PROGRAMS if name not in {"helm", "kubeconform", "versitygw"})
"""What runs; the others are tools of tests, built when one asks."""

_FAKE_NODES = 4
_FAKE_NODES_WITH_GPUS = 2

_CHARTER = "cluster.json"


class Kind(StrEnum):
    """How much of a Kubernetes it is."""

    CONTROL_PLANE = "control-plane"
    """etcd, API server, controller manager, scheduler: objects, but no pods that run. Needs no root."""
    FULL = "full"
    """And a node with containerd, a pods' network, DNS, Envoy Gateway, and fake nodes. Needs root."""


@dataclass(frozen=True, slots=True)
class Charter:
    """What is fixed for a cluster's life. ``net`` is the second byte of a full cluster's addresses."""

    kind: Kind
    ports: Ports
    net: int | None = None

    @property
    def machine(self) -> str:
        """The address at which the cluster's parts reach this machine."""
        return "127.0.0.1" if self.net is None else Net(self.net).machine


@dataclass(frozen=True, slots=True)
class Status:
    """``running``: programs; ``missing``: programs that were started and run no more."""

    folder: Path
    kind: Kind | None
    ready: bool
    kubeconfig: Path | None
    running: tuple[str, ...]
    missing: tuple[str, ...]


def default_folder() -> Path:
    chosen = os.environ.get(FOLDER_SETTING)
    return Path(chosen).resolve() if chosen else programs.cache() / "run"


class Cluster:
    """The cluster in ``folder``, whether it runs or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.daemons = Daemons(self.folder)

    @property
    def charter(self) -> Charter | None:
        """None: there is no cluster here."""
        try:
            known = json.loads((self.folder / _CHARTER).read_text())
        except FileNotFoundError:
            return None
        return Charter(Kind(known["kind"]), Ports(**known["ports"]), known["net"])

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.folder / "kubeconfig"

    @property
    def access(self) -> Access:
        return Access(self.kubeconfig, self)

    @property
    def net(self) -> Net:
        """
        Raises:
            ClusterError: there is no full cluster here.
        """
        charter = self.charter
        if charter is None or charter.net is None:
            raise ClusterError(
                f"there is no full cluster in {self.folder}: python -m tests.cluster up --folder {self.folder}"
            )
        return Net(charter.net)

    @property
    def namespaces(self) -> Namespaces:
        return Namespaces(self.folder, self.net, self.daemons)

    @property
    def control_plane(self) -> ControlPlane:
        """
        Raises:
            ClusterError: there is none here.
        """
        charter = self.charter
        if charter is None:
            raise ClusterError(
                f"there is no cluster in {self.folder}: python -m tests.cluster up --folder {self.folder}"
            )
        if charter.net is None:
            return ControlPlane(self.folder, "127.0.0.1", charter.ports, service_range=_SERVICES)
        return ControlPlane(
            self.folder, self.net.node, charter.ports, service_range=self.net.services, prefix=self.namespaces.enter
        )

    @property
    def node(self) -> Node:
        return Node(self.folder, self.net, self.namespaces, self.control_plane, self.daemons)

    @property
    def services(self) -> Services:
        return Services(self.folder, self.net, self.namespaces, self.control_plane, self.daemons, self.access)

    def up(self, kind: Kind) -> None:
        """Start what does not run yet; a second call finds nothing to do.

        Raises:
            ClusterError: a part does not start, or the folder holds something else.
        """
        if (reason := why_not(kind)) is not None:
            raise ClusterError(reason)
        self.folder.mkdir(parents=True, exist_ok=True)
        with programs.locked(self._lock):
            for name in _FULL if kind is Kind.FULL else controlplane.PROGRAMS:
                programs.ensure(name)
            # From the choice of ports or addresses until they are taken, nobody else chooses.
            with programs.locked(_addresses()):
                self._found(kind)
                if kind is Kind.CONTROL_PLANE:
                    self.control_plane.up()
                    self.control_plane.settle()
                else:
                    self.namespaces.up()
            if kind is Kind.FULL:
                self._up_full()

    def load_image(self, role: str) -> None:
        """Bring our image of ``role`` to the node, built if need be.

        Raises:
            ClusterError: it cannot be built.
        """
        archive = images.ensure(role)
        brought = self.folder / "node" / "images" / role
        with programs.locked(self._lock):
            if not brought.exists() or brought.read_text() != archive.stem:
                self.node.load(archive)
                brought.parent.mkdir(exist_ok=True)
                brought.write_text(archive.stem)

    def down(self) -> None:
        """End every process and remove every trace; also what a killed run left."""
        self.daemons.kill_all()
        if not self.folder.exists():
            return
        with programs.locked(self._lock):
            charter = self.charter
            self.daemons.kill_all()
            if charter is not None and charter.net is not None:
                with programs.locked(_addresses()):
                    self.namespaces.down()
            if charter is not None or set(self.folder.iterdir()) <= {self._lock}:
                shutil.rmtree(self.folder)

    def status(self) -> Status:
        charter = self.charter
        running = self.daemons.running()
        started = sorted(file.stem for file in (self.folder / "started").glob("*.json"))
        return Status(
            folder=self.folder,
            kind=charter.kind if charter else None,
            ready=charter is not None and set(started) <= set(running) and self.control_plane.ready(),
            kubeconfig=self.kubeconfig if charter else None,
            running=tuple(sorted(running)),
            missing=tuple(name for name in started if name not in running),
        )

    def _up_full(self) -> None:
        node = self.node
        node.start_containerd()
        services = self.services
        with ThreadPoolExecutor(2) as aside:
            loaded = aside.submit(self._load_what_nodes_need)
            self.control_plane.up()
            known = aside.submit(services.know_gateways)
            node.start_kubelet()
            node.start_kube_proxy()
            services.start_dns()
            services.start_fake_nodes(_FAKE_NODES, _FAKE_NODES_WITH_GPUS)
            known.result()
            loaded.result()
        services.start_gateway()
        self.control_plane.settle()
        nodes = (NODE, *(f"fake-{number}" for number in range(_FAKE_NODES)))
        there = (*(f"node/{name}" for name in nodes), f"--timeout={READY_S:.0f}s")
        self.access.kubectl("wait", "--for=create", *there, deadline_s=READY_S + 10)
        self.access.kubectl("wait", "--for=condition=Ready", *there, deadline_s=READY_S + 10)

    def _load_what_nodes_need(self) -> None:
        held = self.node.images()
        for name, contents in (
            (PAUSE_IMAGE, archives.pause),
            (ENVOY_IMAGE, archives.envoy),
            (SHUTDOWN_IMAGE, archives.shutdown_manager),
        ):
            if name not in held:
                self.node.load(archives.archive(name, contents()))

    @property
    def _lock(self) -> Path:
        return self.folder / ".lock"

    def _found(self, kind: Kind) -> None:
        """Lay down what the cluster is, or see that it is what is asked for."""
        charter = self.charter
        if charter is None:
            if others := sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")):
                raise ClusterError(
                    f"{self.folder} holds other things ({others[0]}, ...); name an empty folder with --folder"
                )
            charter = _new_charter(kind)
            unfinished = self.folder / f".{_CHARTER}"
            unfinished.write_text(json.dumps(asdict(charter), indent=1))
            unfinished.replace(self.folder / _CHARTER)
        if charter.kind != kind:
            raise ClusterError(
                f"{self.folder} holds a cluster of kind {charter.kind}; take it down first "
                f"(python -m tests.cluster down --folder {self.folder}) or name another folder with --folder"
            )


def why_not(kind: Kind) -> str | None:
    """Why this machine can have no cluster of this kind, in one line; None: it can."""
    if kind is Kind.CONTROL_PLANE:
        return programs.why_not(controlplane.PROGRAMS)
    return namespaces.why_not() or node.why_not() or programs.why_not(_FULL)


def _addresses() -> Path:
    """Who holds this lock chooses, takes or gives back a full cluster's addresses."""
    programs.cache().mkdir(parents=True, exist_ok=True)
    return programs.cache() / ".addresses.lock"


def _new_charter(kind: Kind) -> Charter:
    if kind is Kind.FULL:
        return Charter(kind, Ports(), free_second(*_NETS))
    return Charter(kind, Ports(*free_ports(5)))
