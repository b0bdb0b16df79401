"""The one real node: containerd, kubelet, kube-proxy and the pods' network, inside the cluster's namespaces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import programs
from tests.cluster.archives import PAUSE_IMAGE
from tests.cluster.controlplane import ControlPlane
from tests.cluster.daemons import Daemons, write_settings
from tests.cluster.errors import ClusterError
from tests.cluster.namespaces import Namespaces
from tests.cluster.net import Net

NAME = "endcap-node"

INSTALLED = (
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "iptables",
    "conntrack",
    "ip",
    "nsenter",
    "unshare",
    "setsid",
)
"""Programs of the system that a node is made of."""

_SOCKET = "/run/containerd/containerd.sock"
_UNUSED = [f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "zfs", "devmapper")]
_PLUGINS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))


@dataclass(frozen=True, slots=True)
class Node:
    folder: Path
    net: Net
    namespaces: Namespaces
    control_plane: ControlPlane
    daemons: Daemons

    def start_containerd(self) -> None:
        """Needs no API server."""
        write_settings(self._file("containerd.toml"), self._containerd())
        write_settings(self._file("resolv.conf"), "")
        write_settings(self._file("cni/10-endcap.conflist"), json.dumps(self._network(), indent=1))
        self._start("containerd", "containerd", f"--config={self._file('containerd.toml')}")
        self.daemons.wait_until(self._answers, "containerd")

    def start_kubelet(self) -> None:
        kubeconfig = self.control_plane.authority.kubeconfig(
            self._file("kubelet.kubeconfig"), self.control_plane.server, f"system:node:{NAME}", "system:nodes"
        )
        write_settings(self._file("kubelet.yaml"), yaml.safe_dump(self._kubelet(), sort_keys=False))
        self._start(
            "kubelet",
            str(programs.path("kubelet")),
            f"--config={self._file('kubelet.yaml')}",
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={NAME}",
            f"--node-ip={self.net.node}",
            "--node-labels=topology.kubernetes.io/zone=zone-a",
        )

    def start_kube_proxy(self) -> None:
        kubeconfig = self.control_plane.authority.kubeconfig(
            self._file("kube-proxy.kubeconfig"), self.control_plane.server, "system:kube-proxy"
        )
        write_settings(self._file("kube-proxy.yaml"), yaml.safe_dump(self._kube_proxy(kubeconfig), sort_keys=False))
        self._start("kube-proxy", str(programs.path("kube-proxy")), f"--config={self._file('kube-proxy.yaml')}")

    def images(self) -> set[str]:
        """The names of what containerd holds."""
        return set(self.ctr("images", "list", "--quiet").split())

    def load(self, archive: Path) -> None:
        """Give containerd an image from a docker-archive."""
        self.ctr("images", "import", str(archive))

    def ctr(self, *arguments: str) -> str:
        return self.namespaces.run("ctr", f"--address={_SOCKET}", "--namespace=k8s.io", *arguments)

    def _answers(self) -> bool:
        try:
            self.ctr("version")
        except ClusterError:
            return False
        return True

    def _containerd(self) -> str:
        # The machine may lack CAP_SYS_RESOURCE (no lower oom_score_adj), huge pages and AppArmor.
        return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = {json.dumps(_UNUSED)}
[grpc]
  address = "{_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_plugins()}"
    conf_dir = "{self._file("cni")}"
"""

    def _network(self) -> Mapping[str, Any]:
        # A route to each pod instead of a bridge: a Service's answer from one pod to another always passes the node.
        return {
            "cniVersion": "0.4.0",
            "name": "endcap",
            "plugins": [
                {
                    "type": "ptp",
                    "ipMasq": False,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": self.net.pods}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                        "dataDir": "/var/lib/cni/networks",
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }

    def _kubelet(self) -> Mapping[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.net.node,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.control_plane.authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [self.net.dns],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self._file("resolv.conf")),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.namespaces.cgroup}",
            "failSwapOn": False,
            "featureGates": {"KubeletInUserNamespace": True},
            "oomScoreAdj": 0,
            "localStorageCapacityIsolation": False,
            "enforceNodeAllocatable": [],
            # The machine's disk and memory are others' too: nothing is thrown out because of them.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "0%",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
            },
            "maxPods": 250,
            "nodeStatusUpdateFrequency": "4s",
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "serializeImagePulls": False,
        }

    def _kube_proxy(self, kubeconfig: Path) -> Mapping[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            "hostnameOverride": NAME,
            "mode": "iptables",
            "clusterCIDR": self.net.pods,
            # These are settings of the machine, which namespaces do not own.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "iptables": {"minSyncPeriod": "100ms"},
        }

    def _file(self, name: str) -> Path:
        return self.folder / "node" / name

    def _start(self, name: str, *command: str) -> None:
        self.daemons.start(name, command, prefix=self.namespaces.enter)


def why_not() -> str | None:
    """Why this machine can have no node, in one line; None: it can."""
    missing = [name for name in INSTALLED if shutil.which(name) is None]
    if not any((folder / "ptp").exists() for folder in _PLUGINS):
        missing.append("the CNI plugins")
    if missing:
        return (
            f"a node needs {', '.join(missing)}; on Debian: "
            "apt-get install containerd runc containernetworking-plugins iptables conntrack iproute2"
        )
    return None


def _plugins() -> Path:
    return next(folder for folder in _PLUGINS if (folder / "ptp").exists())
