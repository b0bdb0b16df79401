"""What runs beside the node as processes: DNS, Envoy Gateway, and the keeper of fake nodes.

They are reached from pods by Services without a selector. Inside the cluster's namespaces.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import programs
from tests.cluster.access import Access
from tests.cluster.archives import ENVOY_IMAGE, SHUTDOWN_IMAGE
from tests.cluster.controlplane import ControlPlane
from tests.cluster.daemons import READY_S, Daemons, write_settings
from tests.cluster.namespaces import Namespaces
from tests.cluster.net import Net

GATEWAY_CLASS = "envoy"
"""Gateways of this class get an Envoy of their own, reached at the address in their status, from this machine too."""

_GATEWAY_NAMESPACE = "envoy-gateway-system"
_PROXY = "endcap-test-proxy"


@dataclass(frozen=True, slots=True)
class Services:
    folder: Path
    net: Net
    namespaces: Namespaces
    control_plane: ControlPlane
    daemons: Daemons
    access: Access

    def start_dns(self) -> None:
        kubeconfig = self._kubeconfig("coredns")
        corefile = self.folder / "node" / "Corefile"
        corefile.write_text(
            f"""\
cluster.local:53 in-addr.arpa:53 {{
    bind {self.net.node}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig}
        ttl 5
    }}
}}
.:53 {{
    bind {self.net.node}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
        )
        self._start("coredns", f"-conf={corefile}")
        self.access.apply(
            *_service_at(
                "kube-system", "kube-dns", self.net.node, {"dns": (53, "UDP"), "dns-tcp": (53, "TCP")}, self.net.dns
            )
        )

    def know_gateways(self) -> None:
        """The kinds of the Gateway API and of Envoy Gateway; the API server works on them for some seconds."""
        known = self.folder / "node" / "gateway-crds"
        crds = programs.ensure_documents(programs.GATEWAY_CRDS)
        if not known.exists() or known.read_text() != crds.name:
            self.access.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
            # Envoy Gateway ends where it does not find a kind that it works on.
            self.access.kubectl("wait", "--for=condition=Established", "-f", str(crds), f"--timeout={READY_S:.0f}s")
            known.write_text(crds.name)

    def start_gateway(self) -> None:
        """Envoy Gateway and its class of Gateways; in a root folder of its own: its certificates' path is fixed."""
        self.access.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": _GATEWAY_NAMESPACE}},
            *_service_at(
                _GATEWAY_NAMESPACE,
                "envoy-gateway",
                self.net.node,
                {
                    "grpc": (18000, "TCP"),
                    "ratelimit": (18001, "TCP"),
                    "wasm": (18002, "TCP"),
                    "metrics": (19001, "TCP"),
                },
            ),
        )
        root = self.folder / "gateway"
        for folder in ("certs", "config", "tmp", "var"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        program = root / "envoy-gateway"
        if not program.exists():
            shutil.copy2(programs.ensure("envoy-gateway"), program)
        write_settings(root / "config" / "kubeconfig", self._kubeconfig("envoy-gateway").read_text())
        write_settings(root / "config" / "envoy-gateway.yaml", yaml.safe_dump(_envoy_gateway()))
        environment = {
            "KUBECONFIG": "/config/kubeconfig",
            "ENVOY_GATEWAY_NAMESPACE": _GATEWAY_NAMESPACE,
            "KUBERNETES_CLUSTER_DOMAIN": "cluster.local",
            "HOME": "/var",
        }
        inside = (*self.namespaces.enter, "chroot", str(root))
        if not (root / "certs" / "tls.crt").exists():
            self.namespaces.run(
                *("env", *(f"{key}={value}" for key, value in environment.items()), "chroot", str(root)),
                *("/envoy-gateway", "certgen", "--disable-topology-injector"),
            )
            secret = self.access.get("secret", "envoy-gateway", f"--namespace={_GATEWAY_NAMESPACE}")
            for name, data in secret["data"].items():
                (root / "certs" / name).write_bytes(base64.b64decode(data))
        self.daemons.start(
            "envoy-gateway",
            ("/envoy-gateway", "server", "--config-path=/config/envoy-gateway.yaml"),
            environment,
            inside,
        )
        self.access.apply(*_gateway_class())
        self.daemons.wait_until(self._takes_gateways, "envoy-gateway")

    def _takes_gateways(self) -> bool:
        waited = ("wait", f"gatewayclass/{GATEWAY_CLASS}", "--for=condition=Accepted", "--timeout=2s")
        return self.access.try_kubectl(*waited).returncode == 0 and "envoy-gateway" in self.daemons.running()

    def start_fake_nodes(self, count: int, with_gpus: int) -> None:
        """``count`` nodes that run nothing and say they do; the first ``with_gpus`` of them have 8 GPUs each."""
        kubeconfig = self._kubeconfig("kwok")
        self._start(
            "kwok",
            f"--kubeconfig={kubeconfig}",
            f"--config={programs.ensure_documents(programs.KWOK_STAGES)}",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            f"--cidr={self.net.fake_pods}",
            f"--node-ip={self.net.node}",
            "--node-lease-duration-seconds=40",
            "--server-address=",
        )
        self.access.apply(*(fake_node(number, gpus=8 if number < with_gpus else 0) for number in range(count)))

    def _kubeconfig(self, name: str) -> Path:
        return self.control_plane.authority.kubeconfig(
            self.folder / "node" / f"{name}.kubeconfig",
            self.control_plane.server,
            f"endcap-test-{name}",
            "system:masters",
        )

    def _start(self, name: str, *arguments: str) -> None:
        self.daemons.start(name, [str(programs.ensure(name)), *arguments], prefix=self.namespaces.enter)


def fake_node(number: int, *, gpus: int = 0) -> dict[str, Any]:
    """A node for kwok to keep. Only pods that tolerate ``kwok.x-k8s.io/node`` come to it."""
    room = {"cpu": "32", "memory": "256Gi", "pods": "250", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": f"fake-{number}",
            "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
            "labels": {
                "kubernetes.io/hostname": f"fake-{number}",
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "topology.kubernetes.io/zone": f"zone-{'abc'[number % 3]}",
                "type": "kwok",
                **({"nvidia.com/gpu.present": "true"} if gpus else {}),
            },
        },
        "spec": {
            "taints": [
                {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"},
                *([{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}] if gpus else []),
            ]
        },
        "status": {"allocatable": room, "capacity": room, "nodeInfo": {"kubeletVersion": "fake"}},
    }


def _service_at(
    namespace: str, name: str, address: str, ports: Mapping[str, tuple[int, str]], cluster_ip: str | None = None
) -> list[dict[str, Any]]:
    """A Service and the one address behind it."""
    meta = {"name": name, "namespace": namespace}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                **({"clusterIP": cluster_ip} if cluster_ip else {}),
                "ports": [{"name": key, "port": port, "protocol": protocol} for key, (port, protocol) in ports.items()],
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**meta, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": key, "port": port, "protocol": protocol} for key, (port, protocol) in ports.items()],
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        },
    ]


def _envoy_gateway() -> dict[str, Any]:
    return {
        "apiVersion": "gateway.envoyproxy.io/v1alpha1",
        "kind": "EnvoyGateway",
        "gateway": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
        "provider": {
            "type": "Kubernetes",
            "kubernetes": {
                "shutdownManager": {"image": SHUTDOWN_IMAGE},
                "leaderElection": {"disable": True},
                "topologyInjector": {"disable": True},
            },
        },
        "logging": {"level": {"default": "info"}},
        "extensionApis": {"enableEnvoyPatchPolicy": True, "enableBackend": True},
    }


def _gateway_class() -> list[dict[str, Any]]:
    small = {"requests": {"cpu": "50m", "memory": "64Mi"}}
    return [
        {
            "apiVersion": "gateway.envoyproxy.io/v1alpha1",
            "kind": "EnvoyProxy",
            "metadata": {"name": _PROXY, "namespace": _GATEWAY_NAMESPACE},
            "spec": {
                "provider": {
                    "type": "Kubernetes",
                    "kubernetes": {
                        "envoyDeployment": {"container": {"image": ENVOY_IMAGE, "resources": small}},
                        "envoyService": {"type": "ClusterIP"},
                    },
                },
                "concurrency": 1,
            },
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": GATEWAY_CLASS},
            "spec": {
                "controllerName": "gateway.envoyproxy.io/gatewayclass-controller",
                "parametersRef": {
                    "group": "gateway.envoyproxy.io",
                    "kind": "EnvoyProxy",
                    "name": _PROXY,
                    "namespace": _GATEWAY_NAMESPACE,
                },
            },
        },
    ]
