"""The control plane by itself: objects are kept, controllers work, a killed part comes back, and nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.access import Access
from tests.cluster.cluster import Cluster, Kind, why_not
from tests.cluster.conftest import unavailable
from tests.process import wait_until


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.cluster", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_controllers_act_on_objects(control_plane: Access, namespace: str) -> None:
    control_plane.kubectl("create", "deployment", "web", "--image=nothing", "--replicas=3", f"--namespace={namespace}")
    wait_until(
        lambda: len(control_plane.get("pods", f"--namespace={namespace}")["items"]) == 3,
        "a pod a replica",
        deadline_s=120,
    )


def test_a_namespace_of_a_test_goes_away(control_plane: Access) -> None:
    with control_plane.namespace() as name:
        control_plane.kubectl("create", "configmap", "kept", f"--namespace={name}")
    wait_until(
        lambda: control_plane.try_kubectl("get", "namespace", name).returncode != 0,
        "the namespace is gone",
        deadline_s=120,
    )


def test_objects_survive_an_api_server_that_is_killed(own_control_plane: Cluster) -> None:
    access = own_control_plane.access
    access.kubectl("create", "configmap", "kept", "--namespace=default")
    for name in ("kube-apiserver", "etcd"):
        own_control_plane.daemons.stop(name, with_signal=signal.SIGKILL)
    assert access.try_kubectl("get", "configmap", "kept", "--namespace=default").returncode != 0
    status = own_control_plane.status()
    assert not status.ready
    assert {"etcd", "kube-apiserver"} <= set(status.missing)  # others may end without them

    own_control_plane.up(Kind.CONTROL_PLANE)

    assert own_control_plane.status().ready
    assert access.get("configmap", "kept", "--namespace=default")["metadata"]["name"] == "kept"


def test_up_twice_starts_once_and_down_leaves_nothing(tmp_path: Path) -> None:
    if (reason := why_not(Kind.CONTROL_PLANE)) is not None:
        unavailable(reason)
    folder = tmp_path / "cluster"
    here = f"--folder={folder}"
    cluster = Cluster(folder)
    try:
        first = command("up", "--only", "control-plane", here)
        assert first.returncode == 0, first.stderr
        numbers = cluster.daemons.running()
        second = command("up", "--only", "control-plane", here)
        assert second.returncode == 0, second.stderr
        assert cluster.daemons.running() == numbers
        status = json.loads(command("status", "--json", here).stdout)
        assert status["ready"]
        assert status["kind"] == "control-plane"

        # A run that was killed, with whatever it had written down lost.
        for some in (numbers["kube-apiserver"], numbers["kube-scheduler"]):
            os.kill(some[0], signal.SIGKILL)
        for note in (folder / "started").iterdir():
            note.unlink()
    finally:
        downed = command("down", here)
    assert downed.returncode == 0, downed.stderr
    assert cluster.daemons.running() == {}
    assert not folder.exists()
    assert command("status", here).returncode == 1


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    if (reason := why_not(Kind.CONTROL_PLANE)) is not None:
        unavailable(reason)
    (tmp_path / "letters.txt").write_text("mine")
    refused = command("up", "--only", "control-plane", f"--folder={tmp_path}")
    assert refused.returncode == 2
    assert "holds other things (letters.txt" in refused.stderr
    command("down", f"--folder={tmp_path}")
    assert (tmp_path / "letters.txt").read_text() == "mine"


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_skip_is_a_failure_in_ci(in_ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true" if in_ci else "")
    with pytest.raises(pytest.fail.Exception if in_ci else pytest.skip.Exception, match="no Go"):
        unavailable("no Go")
