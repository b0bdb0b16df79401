"""etcd, the API server, the controller manager and the scheduler, as processes."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.cluster import programs
from tests.cluster.daemons import Daemons
from tests.cluster.pki import Authority
from tests.cluster.ports import listens

PROGRAMS = ("etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler")


@dataclass(frozen=True, slots=True)
class Ports:
    etcd: int = 2379
    etcd_peer: int = 2380
    api: int = 6443
    controller_manager: int = 10257
    scheduler: int = 10259


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """A control plane in ``folder``.

    It listens on ``host``; ``prefix`` enters the namespaces in which it runs.
    The API server's Service has the first address of ``service_range``, a CIDR.
    """

    folder: Path
    host: str
    ports: Ports
    service_range: str
    prefix: tuple[str, ...] = ()
    authority: Authority = field(init=False)
    daemons: Daemons = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "authority", Authority(self.folder / "pki"))
        object.__setattr__(self, "daemons", Daemons(self.folder))

    @property
    def server(self) -> str:
        return f"https://{self.host}:{self.ports.api}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.folder / "kubeconfig"

    def up(self) -> None:
        """Start what does not run, and wait until the API server is ready. Its :data:`PROGRAMS` are built before."""
        self.authority.create()
        self.authority.kubeconfig(self.kubeconfig, self.server, "endcap-test-admin", "system:masters")
        self._start_etcd()
        self._start_api_server()
        self.wait()
        self._start_controller_manager()
        self._start_scheduler()

    def settle(self) -> None:
        """Until controllers and scheduler listen too.

        Raises:
            ClusterError: one of them ended, or does not come.
        """
        ports = {"kube-controller-manager": self.ports.controller_manager, "kube-scheduler": self.ports.scheduler}
        for name, port in ports.items():
            self.daemons.wait_until(partial(listens, self.host, port), name)

    def wait(self) -> None:
        """Until the API server says that it is ready.

        Raises:
            ClusterError: it does not come.
        """
        self.daemons.wait_until(self.ready, "kube-apiserver")

    def ready(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(*self.authority.issue("kubeconfig", "endcap-test-admin", "system:masters"))
        try:
            with urllib.request.urlopen(f"{self.server}/readyz", context=context, timeout=5.0) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _start_etcd(self) -> None:
        server = self.authority.issue("etcd", "etcd", addresses=(self.host,))
        client, peer = (f"https://{self.host}:{port}" for port in (self.ports.etcd, self.ports.etcd_peer))
        ca = str(self.authority.certificate)
        self._start(
            "etcd",
            "--name=endcap",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=endcap={peer}",
            f"--cert-file={server[0]}",
            f"--key-file={server[1]}",
            f"--peer-cert-file={server[0]}",
            f"--peer-key-file={server[1]}",
            f"--trusted-ca-file={ca}",
            f"--peer-trusted-ca-file={ca}",
            "--client-cert-auth",
            "--peer-client-cert-auth",
            "--unsafe-no-fsync",  # the data does not outlive the machine's tests
            "--log-level=warn",
        )

    def _start_api_server(self) -> None:
        first = _first_address(self.service_range)
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
        serving = self.authority.issue("kube-apiserver", "kube-apiserver", addresses=(self.host, first, *names))
        etcd = self.authority.issue("apiserver-etcd", "kube-apiserver")
        kubelet = self.authority.issue("apiserver-kubelet", "endcap-test-apiserver", "system:masters")
        proxy = self.authority.issue("front-proxy", "front-proxy")
        private, public = self.authority.signing_key("service-accounts")
        ca = str(self.authority.certificate)
        self._start(
            "kube-apiserver",
            f"--bind-address={self.host}",
            f"--advertise-address={self.host}",
            # Loopback is no address that an Endpoints object may hold; nothing runs there that could use it.
            *(["--endpoint-reconciler-type=none"] if self.host.startswith("127.") else []),
            f"--secure-port={self.ports.api}",
            f"--etcd-servers=https://{self.host}:{self.ports.etcd}",
            f"--etcd-cafile={ca}",
            f"--etcd-certfile={etcd[0]}",
            f"--etcd-keyfile={etcd[1]}",
            f"--tls-cert-file={serving[0]}",
            f"--tls-private-key-file={serving[1]}",
            f"--client-ca-file={ca}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={kubelet[0]}",
            f"--kubelet-client-key={kubelet[1]}",
            f"--requestheader-client-ca-file={ca}",
            "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={proxy[0]}",
            f"--proxy-client-key-file={proxy[1]}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-signing-key-file={private}",
            f"--service-account-key-file={public}",
            f"--service-cluster-ip-range={self.service_range}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            "--profiling=false",
        )

    def _start_controller_manager(self) -> None:
        private, _ = self.authority.signing_key("service-accounts")
        self._start(
            "kube-controller-manager",
            *self._as_client("kube-controller-manager", self.ports.controller_manager),
            f"--root-ca-file={self.authority.certificate}",
            f"--service-account-private-key-file={private}",
            f"--cluster-signing-cert-file={self.authority.certificate}",
            f"--cluster-signing-key-file={self.authority.key}",
            "--use-service-account-credentials=true",
            "--allocate-node-cidrs=false",
            # A node that is lost is noticed within a test's patience.
            "--node-monitor-period=2s",
            "--node-monitor-grace-period=16s",
            # Claims that came before their volume, and autoscalers, are looked at more often than each 15 s.
            "--pvclaimbinder-sync-period=1s",
            "--horizontal-pod-autoscaler-sync-period=5s",
        )

    def _start_scheduler(self) -> None:
        self._start("kube-scheduler", *self._as_client("kube-scheduler", self.ports.scheduler))

    def _as_client(self, name: str, port: int) -> tuple[str, ...]:
        kubeconfig = str(self.authority.kubeconfig(self.folder / f"{name}.kubeconfig", self.server, f"system:{name}"))
        return (
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--bind-address={self.host}",
            f"--secure-port={port}",
            f"--cert-dir={self.folder / name}",
            "--leader-elect=false",
            "--profiling=false",
        )

    def _start(self, name: str, *arguments: str) -> None:
        self.daemons.start(name, [str(programs.path(name)), *arguments], prefix=self.prefix)


def _first_address(cidr: str) -> str:
    base = cidr.partition("/")[0].rpartition(".")[0]
    return f"{base}.1"
