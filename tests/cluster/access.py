"""What tests use of a cluster: a kubeconfig, kubectl, namespaces that go away, and waiting."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.cluster import images, programs
from tests.cluster.errors import ClusterError

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

KUBECONFIG_SETTING = "ENDCAP_TEST_KUBECONFIG"
IMAGES_SETTING = "ENDCAP_TEST_IMAGES"
GATEWAY_CLASS_SETTING = "ENDCAP_TEST_GATEWAY_CLASS"

PATIENCE_S = 120.0
"""Within which a cluster on a busy machine does a thing; waiting ends as soon as it is done."""


@dataclass(frozen=True, slots=True)
class Access:
    """``cluster`` is None where the Kubernetes is not one of ours: then its parts cannot be stopped or looked into."""

    kubeconfig: Path
    cluster: Cluster | None

    @property
    def host(self) -> str:
        """Where the API server, and pods where there are any, reach what a test starts on this machine."""
        charter = self.cluster.charter if self.cluster else None
        if charter is None:
            raise ClusterError(f"the cluster of {self.kubeconfig} is not one of ours: it need not reach this machine")
        return charter.machine

    def kubectl(self, *arguments: str, stdin: str | None = None, deadline_s: float = PATIENCE_S) -> str:
        """What kubectl prints.

        Raises:
            ClusterError: it failed; with what it said.
        """
        ended = self.try_kubectl(*arguments, stdin=stdin, deadline_s=deadline_s)
        if ended.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {ended.stderr.strip()}")
        return ended.stdout

    def try_kubectl(
        self, *arguments: str, stdin: str | None = None, deadline_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        """The same, whatever it answers."""
        return subprocess.run(
            [self._program("kubectl"), *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )

    def helm(self, *arguments: str, deadline_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """What helm answers, whatever that is."""
        return subprocess.run(
            [self._program("helm"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )

    def apply(self, *documents: Mapping[str, Any], namespace: str = "") -> None:
        """Apply on the server's side, as field manager ``endcap-tests``."""
        into = [f"--namespace={namespace}"] if namespace else []
        self.kubectl(
            *("apply", "--server-side", "--force-conflicts", "--field-manager=endcap-tests", *into, "-f", "-"),
            stdin=yaml.safe_dump_all(documents),
        )

    def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get ARGUMENTS`` as a document."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "-o", "json", *arguments))
        return found

    def image(self, role: str) -> str:
        """What pods of this cluster call our image of ``role``; where the cluster is ours, built and brought to it."""
        if self.cluster is None:
            prefix = os.environ.get(IMAGES_SETTING)
            if not prefix:
                raise ClusterError(
                    f"say where this cluster finds our images: {IMAGES_SETTING}=registry.example/endcap (/{role}:test)"
                )
            return f"{prefix}/{role}:test"
        self.cluster.load_image(role)
        return images.name(role)

    @property
    def gateway_class(self) -> str:
        """The GatewayClass for the tests' Gateways."""
        return os.environ.get(GATEWAY_CLASS_SETTING, "envoy") if self.cluster is None else "envoy"

    def gateway_url(self, name: str, namespace: str) -> str:
        """Where the Gateway ``name`` listens for HTTP."""
        addresses = self.get("gateway", name, f"--namespace={namespace}")["status"]["addresses"]
        return f"http://{addresses[0]['value']}"

    def wait(self, what: str, condition: str, namespace: str, *, deadline_s: float = 180.0) -> None:
        """``kubectl wait``; what it waits for need not be there yet.

        Raises:
            ClusterError: it does not come; with what the cluster says of the namespace's pods.
        """
        there = ("--for=create", f"--for={condition}")
        for each in there:
            ended = self.try_kubectl(
                *("wait", what, each, f"--namespace={namespace}", f"--timeout={deadline_s:.0f}s"),
                deadline_s=deadline_s + 30,
            )
            if ended.returncode != 0:
                seen = self.try_kubectl("get", "pods,events", f"--namespace={namespace}").stdout
                raise ClusterError(f"{what} is not {condition}: {ended.stderr.strip()}\n{seen}")

    @property
    def environment(self) -> dict[str, str]:
        """For programs that are to find this cluster."""
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """A namespace for the block."""
        name = f"endcap-test-{uuid.uuid4().hex[:10]}"
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "endcap-tests"}},
            }
        )
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")

    def _program(self, name: str) -> str:
        if self.cluster is None and (own := shutil.which(name)):
            return own
        return str(programs.ensure(name))
