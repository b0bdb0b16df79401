"""A full cluster of its own comes up once, and leaves nothing on the machine, whatever was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Kind, why_not
from tests.cluster.conftest import unavailable
from tests.cluster.errors import ClusterError
from tests.cluster.namespaces import interfaces
from tests.cluster.net import Net
from tests.cluster.test_control_plane import command
from tests.process import wait_until

NOTHING: dict[str, list[str]] = {"processes": [], "mounts": [], "control groups": [], "interfaces": [], "routes": []}


def traces(folder: Path, net: Net) -> dict[str, list[str]]:
    """What the cluster in ``folder`` left on the machine, by kind."""
    return {
        "processes": [
            process.name
            for process in Path("/proc").iterdir()
            if process.name.isdigit()
            and str(folder).encode() in _read(process / "environ") + _read(process / "cmdline")
        ],
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line],
        "control groups": [str(group) for group in Path("/sys/fs/cgroup").glob(f"*/endcap-test-{net.second}")],
        "interfaces": [name for name in interfaces() if name == net.interface],
        "routes": [line for line in _routes() if f"10.{net.second}." in line],
    }


_LAST_NET = 216
"""Of those that clusters may have: the last to be taken."""


def _routes() -> list[str]:
    shown = ["ip", "route", "show", "table", "all"]
    return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder for a cluster; nothing of it exists yet."""
    if (reason := why_not(Kind.FULL)) is not None:
        unavailable(reason)
    return tmp_path / "cluster"


def test_up_twice_killed_and_down(elsewhere: Path) -> None:
    cluster = Cluster(elsewhere)
    here = f"--folder={elsewhere}"
    try:
        first = command("up", here)
        assert first.returncode == 0, first.stderr
        numbers = cluster.daemons.running()
        second = command("up", here)
        assert second.returncode == 0, second.stderr
        assert cluster.daemons.running() == numbers
        assert json.loads(command("status", "--json", here).stdout)["ready"]

        cluster.access.kubectl("create", "deployment", "web", "--image=docker.io/endcap/test-pause:1", "--replicas=2")
        cluster.access.wait("deployment/web", "condition=Available", "default")
        net = cluster.net
        assert all(traces(elsewhere, net)[kind] for kind in ("processes", "control groups", "interfaces", "routes"))

        # Everything at once, as when a machine's memory ran out.
        for each in numbers.values():
            for number in each:
                with contextlib.suppress(ProcessLookupError):  # it went with the first process of its namespace
                    os.kill(number, signal.SIGKILL)
        wait_until(lambda: cluster.daemons.running() == {}, "all of it is dead")
    finally:
        downed = command("down", here)
    assert downed.returncode == 0, downed.stderr
    assert not elsewhere.exists()
    assert traces(elsewhere, net) == NOTHING


def test_a_dead_clusters_addresses_may_be_anothers(elsewhere: Path) -> None:
    """Its going leaves the other alone, and it does not come back into the other's."""
    dead, living = Cluster(elsewhere), Cluster(elsewhere.with_name("living"))
    try:
        for cluster in (dead, living):
            cluster.folder.mkdir()
            (cluster.folder / "cluster.json").write_text(json.dumps({"kind": "full", "ports": {}, "net": _LAST_NET}))
        living.namespaces.up()
        with pytest.raises(ClusterError, match="has become another cluster's"):
            dead.namespaces.up()
        dead.down()
        assert not dead.folder.exists()
        assert living.net.interface in interfaces()
        assert list(Path("/sys/fs/cgroup").glob(f"**/{living.namespaces.cgroup}"))
    finally:
        living.down()
        dead.down()
    assert f"endcap{_LAST_NET}" not in interfaces()


def test_one_killed_part_is_started_again(elsewhere: Path) -> None:
    cluster = Cluster(elsewhere)
    try:
        cluster.up(Kind.FULL)
        cluster.access.kubectl("create", "deployment", "web", "--image=docker.io/endcap/test-pause:1")
        cluster.access.wait("deployment/web", "condition=Available", "default")
        for name in ("kubelet", "containerd", "kube-apiserver"):
            cluster.daemons.stop(name, with_signal=signal.SIGKILL)
        assert {"kubelet", "containerd", "kube-apiserver"} <= set(cluster.status().missing)

        cluster.up(Kind.FULL)

        cluster.access.kubectl("scale", "deployment/web", "--replicas=2")
        cluster.access.wait("deployment/web", "jsonpath={.status.readyReplicas}=2", "default")
    finally:
        cluster.down()
