"""How a local target begins, ends and begins again: nothing left behind, nothing forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from endcap.errors import BusyError, FencedError, InputError, StateError, TargetError, VerificationError
from endcap.files import write_json
from serving.gateway import Envoy, GatewaySettings, Tail, Tally
from serving.targets import LocalTarget, ModelVersion, open_target, start_local_target
from tests.local.load import Load, eventually
from tests.local.test_local_target import config, package, stable_of


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def started(tmp_path: Path) -> Iterator[LocalTarget]:
    with start_local_target(config(tmp_path, replicas_full=1)) as target:
        yield target


def test_a_supervisor_that_starts_again_resumes_with_versions_shares_and_token(
    tmp_path: Path, started: LocalTarget
) -> None:
    stable, canary = stable_of(tmp_path), ModelVersion("2", package(tmp_path / "2"))
    token = started.acquire("first")
    started.ensure_capacity({canary: 0.25, stable: 0.75}, token=token)
    started.set_shares({canary: 0.25, stable: 0.75}, token=token)
    with Load(started.url) as load:
        load.more(40)
    eventually(lambda: started.observe().outcomes.total >= 40)
    counted = started.observe().outcomes.total
    url, children = started.url, children_of(started.found.pid)
    assert len(children) == 5
    os.kill(started.found.pid, signal.SIGKILL)
    eventually(lambda: not any(map(alive, children)), what="every child is gone")
    with pytest.raises(TargetError, match="gone"):
        open_target(started.folder)
    with start_local_target(config(tmp_path, replicas_full=1)) as again:
        assert again.url == url
        assert list(again.observe().shares.items()) == [("2", 0.25), ("1", 0.75)]
        assert again.healthy() == {"1": 2, "2": 2}
        assert again.observe().outcomes.total >= counted
        assert again.acquire("second") > token
        with pytest.raises(FencedError):
            again.retire("2", token=token)
    assert not (again.folder / "target.json").exists()


def test_a_supervisor_killed_under_load_counts_every_line_once(tmp_path: Path, started: LocalTarget) -> None:
    with Load(started.url, rate=100) as load:
        load.more(60)
        eventually((started.folder / "tally.json").exists, what="counts were kept once")
        load.more(60)
        os.kill(started.found.pid, signal.SIGKILL)
        started.wait()
    kept = json.loads((started.folder / "tally.json").read_text())["counts"]["outcomes_total"]
    with start_local_target(config(tmp_path, replicas_full=1)) as again:
        with Load(again.url, rate=100) as load:
            load.more(40)
        settings = GatewaySettings(tmp_path / "xds", tmp_path / "records")

        def recounted() -> bool:
            tally = Tally((100, 400))
            tally.add_attempts(Tail(settings.attempts_log).lines())
            tally.add_outcomes(Tail(settings.access_log).lines())
            seen, counts = again.observe(), tally.versions()["1"]
            requests, attempts = seen.versions["1"].requests, seen.versions["1"].attempts
            return (
                (attempts.good, attempts.total) == (counts.good, counts.total)
                and (requests.good, requests.total) == (counts.requests_good, counts.requests_total)
                and {ms: found.good for ms, found in seen.versions["1"].within_ms.items()} == counts.within_ms
                and seen.outcomes.total == tally.outcomes_total >= kept + 40
            )

        eventually(recounted, what="what is counted is what the records say")
    assert kept > 0


def test_everything_ends_with_the_supervisor_in_order(started: LocalTarget) -> None:
    children = children_of(started.found.pid)
    with Load(started.url, rate=40) as load:
        load.more(10)
    started.stop()
    assert not any(map(alive, children))
    assert load.failed == []
    with pytest.raises(TargetError, match="no target runs here"):
        open_target(started.folder)


def test_everything_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    wanted = config(tmp_path, replicas_full=1)
    script = (
        "import sys, signal; from serving.targets import SupervisorConfig, start_local_target;"
        "start_local_target(SupervisorConfig.model_validate_json(sys.argv[1])); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script, wanted.model_dump_json()]) as parent:
        eventually((wanted.folder / "target.json").exists)
        target = open_target(wanted.folder)
        family = [target.found.pid, *children_of(target.found.pid)]
        target.close()
        parent.kill()
    eventually(lambda: not any(map(alive, family)), what="supervisor and children are gone")


def test_one_that_is_ended_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    package(tmp_path / "1", never_ready=True)
    write_json(wanted.folder / "config.json", wanted.model_dump(mode="json"))
    argv = [sys.executable, "-m", "serving.targets.supervisor", "--config", str(wanted.folder / "config.json")]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as supervisor:
        eventually(lambda: len(children_of(supervisor.pid)) == 3, what="the gateway and two replicas are starting")
        children = children_of(supervisor.pid)
        supervisor.terminate()
        assert supervisor.wait(20) == 0
    assert not any(map(alive, children))


def test_a_second_supervisor_in_the_folder_is_turned_away(tmp_path: Path, started: LocalTarget) -> None:
    with pytest.raises(BusyError, match=f"in use by process {started.found.pid}"):
        start_local_target(config(tmp_path))
    assert started.healthy() == {"1": 2}
    with open_target(started.folder) as other:
        assert other.healthy() == {"1": 2}


def test_a_gateway_that_is_not_ready_in_time_leaves_no_process(tmp_path: Path) -> None:
    envoy = Envoy(GatewaySettings(tmp_path / "xds", tmp_path / "records"), log=tmp_path / "envoy.log")
    envoy.prepare()
    with pytest.raises(TargetError, match="not ready after 0 s"):
        asyncio.run(envoy.start(deadline_s=0.0))
    assert envoy.process.poll() is not None


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use"):
            start_local_target(config(tmp_path, gateway_port=port))
        with pytest.raises(InputError, match=f"port {port} is in use"):
            start_local_target(config(tmp_path, control_port=port))


def test_a_damaged_state_is_never_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "state.json").write_text('{"format": 1, "shares": [["9", 1.0]]}')
    with pytest.raises(StateError, match=r"state\.json"):
        start_local_target(config(tmp_path))
    assert (tmp_path / "target" / "state.json").read_text().endswith('[["9", 1.0]]}')


def test_a_stable_version_that_does_not_verify_is_not_served(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    package(tmp_path / "1", refuse=True)
    with pytest.raises(VerificationError, match="the signature does not verify"):
        start_local_target(wanted)
    assert not (wanted.folder / "target.json").exists()
