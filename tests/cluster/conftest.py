"""A Kubernetes for the tests in this folder.

Which one, in this order: the one that ``ENDCAP_TEST_KUBECONFIG`` names (a real one; tests clean up after themselves);
the built cluster that ``make cluster-up`` left running; one started for this run of the tests and taken down after it.
Where none can be had, the test is skipped with the reason in one line; in CI (``CI=true``) it fails instead.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.targets.kserve import Cluster as KServeCluster
from tests.cluster import programs
from tests.cluster.access import KUBECONFIG_SETTING, Access
from tests.cluster.cluster import Cluster, Kind, default_folder, why_not
from tests.cluster.kserve import kserve
from tests.cluster.shop import Shop, open_shop


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Access]:
    """A Kubernetes where objects are kept and controllers work; whether pods run is not promised."""
    yield from _a_cluster(Kind.CONTROL_PLANE)


@pytest.fixture(scope="session")
def full_cluster() -> Iterator[Access]:
    """A Kubernetes where pods run, with DNS and Envoy Gateway."""
    yield from _a_cluster(Kind.FULL)


@pytest.fixture(scope="session")
def own_control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane that tests may break: kill and restart its parts; nobody else's, and gone afterwards."""
    if (reason := why_not(Kind.CONTROL_PLANE)) is not None:
        unavailable(reason)
    yield from _started(Cluster(Path(tempfile.mkdtemp(prefix="endcap-cluster-"))), Kind.CONTROL_PLANE)


@pytest.fixture(scope="session")
def kserve_on() -> Iterator[Callable[[Access], KServeCluster]]:
    """KServe at work on a cluster until the tests end: once, whoever asks for it."""
    known: dict[Path, KServeCluster] = {}
    with contextlib.ExitStack() as held:

        def ensure(access: Access) -> KServeCluster:
            if access.kubeconfig not in known:
                crds = programs.ensure_documents(programs.GATEWAY_CRDS)
                if access.try_kubectl("get", "crd", "httproutes.gateway.networking.k8s.io").returncode != 0:
                    access.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
                known[access.kubeconfig] = held.enter_context(kserve(access))
            return known[access.kubeconfig]

        yield ensure


@pytest.fixture(scope="session")
def kserve_objects(control_plane: Access, kserve_on: Callable[[Access], KServeCluster]) -> KServeCluster:
    """KServe on ``control_plane``: whether pods run is not promised."""
    return kserve_on(control_plane)


@pytest.fixture(scope="session")
def shop(
    full_cluster: Access, kserve_on: Callable[[Access], KServeCluster], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    """A shop that serves: each test finds what the one before it left to be served."""
    with open_shop(full_cluster, kserve_on(full_cluster), tmp_path_factory.mktemp("shop")) as found:
        yield found


@pytest.fixture
def namespace(control_plane: Access) -> Iterator[str]:
    """A namespace of the test's own on ``control_plane``, deleted after it."""
    with control_plane.namespace() as name:
        yield name


@pytest.fixture
def pod_namespace(full_cluster: Access) -> Iterator[str]:
    """A namespace of the test's own on ``full_cluster``, deleted after it."""
    with full_cluster.namespace() as name:
        yield name


def unavailable(reason: str) -> None:
    """Skip, or fail where a skip would hide that nothing was tested."""
    if os.environ.get("CI", "").lower() in {"1", "true", "yes"}:
        pytest.fail(f"in CI the cluster's tests must run: {reason}", pytrace=False)
    pytest.skip(reason)


def _a_cluster(kind: Kind) -> Iterator[Access]:
    if named := os.environ.get(KUBECONFIG_SETTING):
        yield Access(Path(named), cluster=None)
        return
    running = Cluster(default_folder())
    charter = running.charter
    if charter is not None and charter.kind in {kind, Kind.FULL}:
        running.up(charter.kind)
        yield Access(running.kubeconfig, cluster=running)
        return
    if (reason := why_not(kind)) is not None:
        unavailable(reason)
    for cluster in _started(Cluster(Path(tempfile.mkdtemp(prefix="endcap-cluster-"))), kind):
        yield Access(cluster.kubeconfig, cluster=cluster)


def _started(cluster: Cluster, kind: Kind) -> Iterator[Cluster]:
    try:
        cluster.up(kind)
        yield cluster
    finally:
        cluster.down()
