"""The operator's own process on a real API server: promoted, rolled back, steered, deleted, killed, in two replicas."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.operator.checkpoint import checkpoint_name
from serving.operator.objects import Key
from serving.targets.kserve import open_cluster
from tests.cluster.access import Access
from tests.cluster.cluster import Cluster, Kind
from tests.cluster.operators import FAST, GOOD, LAST, WORSE, World, eventually, install
from tests.operator_world import OBJECTIVES, ROLLOUT, Cut, Shop, drive_to_end
from tests.simulated import WINDOW_S, Killed


@pytest.fixture
def world(control_plane: Access, namespace: str, tmp_path: Path) -> Iterator[World]:
    install(control_plane)
    found = World(control_plane, namespace, tmp_path)
    try:
        yield found
    finally:
        found.stop()


def test_a_better_version_is_promoted_and_people_see_it(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    operator = world.operator()
    world.apply()
    status = world.until("done")
    assert status["outcome"] == "promoted"
    assert world.target()["shares"] == {"2": 1.0}
    world.kubectl("wait", "--for=condition=Promoted", "rollout/shop", "--timeout=60s")
    assert world.kubectl("get", "ro", "shop", "--no-headers").split()[:5] == ["shop", "done", "2/2", "100%", "promoted"]
    described = world.kubectl("describe", "rollout", "shop")
    for told in ("version 2 was promoted", "availability", "worse than control", "Growing", "Ended"):
        assert told in described, told
    assert not world.get()["metadata"].get("finalizers")
    decisions = [line["decision"] for line in world.log() if "decision" in line]
    assert [one["seq"] for one in decisions] == list(range(1, len(decisions) + 1)), "the whole audit log, as JSON"
    assert {line.get("rollout") for line in world.log() if "decision" in line} == {f"{world.namespace}/shop"}
    operator.send_signal(signal.SIGTERM)
    assert operator.wait(timeout=60) == 0
    lease = world.access.get("lease", "endcap-operator", "--namespace", world.namespace)
    assert lease["spec"]["holderIdentity"] == "", "the next one need not wait for it"


def test_a_worse_version_is_rolled_back_with_a_warning(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": WORSE}})
    world.operator()
    world.apply()
    status = world.until("done")
    assert status["outcome"] == "rolled_back"
    assert "click-through" in status["reason"]
    assert world.target()["shares"] == {"1": 1.0}
    assert "Warning" in {one["type"] for one in world.events() if one["reason"] == "Ended"}


def test_it_is_steered_by_annotations(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    world.operator()
    world.apply(steps=[{**FAST["steps"][0]}, {**FAST["steps"][1], "approval": True}])
    eventually(lambda: world.condition("Progressing").get("reason") == "Waiting", "it waits for approval")
    assert "waits for approval" in world.status()["waiting"]
    world.kubectl("annotate", "rollout", "shop", "endcap.dev/pause=ann")
    eventually(lambda: world.condition("Progressing").get("reason") == "Paused", "it is paused")
    world.kubectl("annotate", "rollout", "shop", "endcap.dev/resume=ann")
    eventually(lambda: "endcap.dev/resume" not in world.get()["metadata"].get("annotations", {}), "it was heard")
    eventually(lambda: world.condition("Progressing").get("reason") == "Waiting", "it waits again")
    world.kubectl("annotate", "rollout", "shop", "endcap.dev/approve=bob")
    assert world.until("done")["outcome"] == "promoted"
    by = [(line["action"], line["by"]) for line in world.status()["history"] if "by" in line]
    assert by == [("pause", "ann"), ("resume", "ann"), ("approve", "bob")]


def test_deleting_it_returns_the_traffic_first(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    world.operator()
    world.apply(steps=[{"share": 0.2, "minRequests": 10**8}, LAST])
    eventually(lambda: world.target().get("shares", {}).get("2"), "canary has its share")
    world.kubectl("delete", "rollout", "shop", "--timeout=120s")
    assert world.target()["shares"] == {"1": 1.0}
    assert world.target()["capacity"] == ["1"]
    gone = checkpoint_name("shop")
    eventually(
        lambda: world.access.try_kubectl("get", "configmap", gone, "--namespace", world.namespace).returncode != 0,
        "what it owned is collected",
    )


def test_killed_again_and_again_it_goes_on(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}, "other": {"1": GOOD, "2": WORSE}})
    slow = [{"share": 0.1 * n, "minRequests": 10, "minSeconds": 1} for n in range(1, 6)] + [LAST]
    world.apply("shop", steps=slow)
    world.apply("other", steps=slow)
    for seq in (2, 5, 8):
        process = world.operator(ENDCAP_LEASE_SECONDS="2")
        eventually(lambda seq=seq: world.status("shop").get("seq", 0) >= seq, f"decision {seq}")
        process.kill()
        process.wait()
    world.operator(ENDCAP_LEASE_SECONDS="2")
    assert world.until("done", "shop")["outcome"] == "promoted"
    assert world.until("done", "other")["outcome"] == "rolled_back"
    lease = world.access.get("lease", "endcap-operator", "--namespace", world.namespace)
    assert lease["spec"]["leaseTransitions"] == 4, "each life got a fence of its own"
    seqs = [line["seq"] for line in world.status("shop")["history"]]
    assert seqs == list(range(1, len(seqs) + 1))


def test_of_two_replicas_one_drives_and_the_other_takes_over(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    first = world.operator()
    eventually(lambda: any("drives, with fence" in line["message"] for line in world.log(0)), "the first drives")
    world.operator()
    world.apply(steps=[{"share": 0.2, "minRequests": 10**8}, LAST])
    world.until("observing")
    assert not any("drives, with fence" in line["message"] for line in world.log(1))
    first.send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: any("drives, with fence 2" in line["message"] for line in world.log(1)), "the second drives")
        world.kubectl("annotate", "rollout", "shop", "endcap.dev/promote=ann")
        eventually(lambda: world.target()["shares"] == {"2": 1.0}, "it is driven on")
    finally:
        first.send_signal(signal.SIGCONT)
    assert world.until("done")["outcome"] == "promoted"
    eventually(lambda: any("drives no longer" in line["message"] for line in world.log(0)), "the first knows")
    assert world.target()["shares"] == {"2": 1.0}
    told = [line["decision"]["seq"] for line in world.log(0) if "decision" in line]
    told += [line["decision"]["seq"] for line in world.log(1) if "decision" in line]
    assert len(told) == len(set(told)), "no decision was taken twice"


def test_bad_input_is_a_condition_and_an_event_and_changes_nothing(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    world.operator()
    world.apply("gone")
    found = eventually(lambda: world.condition("Accepted", "gone"), "a condition")
    assert (found["status"], found["reason"]) == ("False", "ServiceNotFound")
    assert "next: create it" in found["message"]
    assert "ServiceNotFound" in {one["reason"] for one in eventually(lambda: world.events("gone"), "an event")}
    world.apply("shop", steps=[{"share": 0.2, "minRequests": 10**8}, LAST])
    world.until("observing")
    world.apply("second", service="shop")
    eventually(lambda: world.condition("Accepted", "second").get("reason") == "ServiceBusy", "two of one service")
    assert world.status("second")["phase"] == "waiting"
    world.apply("third", service="third", objectives="none")
    eventually(lambda: world.condition("Accepted", "third").get("reason") == "InvalidSpec", "no objectives")
    assert not world.get("third")["metadata"].get("finalizers")
    assert world.target("third") == {}


def test_metrics_and_health_are_told(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    world.operator()
    world.apply()
    world.until("done")
    port = next(int(line["message"].rsplit(" ", 1)[1]) for line in world.log() if "listening" in line["message"])

    def page(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    assert page("/healthz") == page("/readyz") == "ok\n"
    metrics = page("/metrics")
    told = {
        'endcap_operator_endings_total{outcome="promoted"} 1.0', "endcap_operator_leads 1.0",
        'endcap_operator_api_requests_total{code="ok",method="PUT"}', "endcap_operator_look_delay_seconds_count",
    }  # fmt: skip
    assert not {one for one in told if one not in metrics}


def test_an_api_server_that_is_killed_and_comes_back_costs_no_verdict(
    own_control_plane: Cluster, tmp_path: Path
) -> None:
    access = Access(own_control_plane.kubeconfig, cluster=own_control_plane)
    install(access)
    with access.namespace() as namespace:
        world = World(access, namespace, tmp_path)
        try:
            world.behave({"shop": {"1": GOOD, "2": GOOD}, "other": {"1": GOOD, "2": WORSE}})
            world.operator()
            slow = [{"share": 0.1 * n, "minRequests": 10, "minSeconds": 1} for n in range(1, 6)] + [LAST]
            world.apply("shop", steps=slow)
            world.apply("other", steps=slow)
            world.until("observing", "shop")
            own_control_plane.daemons.stop("kube-apiserver", with_signal=signal.SIGKILL)
            time.sleep(0.5)
            own_control_plane.up(Kind.CONTROL_PLANE)
            assert world.until("done", "shop")["outcome"] == "promoted"
            assert world.until("done", "other")["outcome"] == "rolled_back"
        finally:
            world.stop()


@pytest.mark.parametrize(("clicked", "expected"), [(0.1, "promoted"), (0.02, "rolled_back")])
def test_killed_at_each_write_to_a_real_api_server_it_goes_on_to_the_same_end(
    clicked: float, expected: str, control_plane: Access, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in tests/unit/test_operator.py, on what resource versions and finalizers really are. Nothing is sampled."""
    install(control_plane)
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    api = open_cluster(kubeconfig=str(control_plane.kubeconfig))
    assert OBJECTIVES["objectives"][1]["windowSeconds"] == WINDOW_S

    def world(name: str) -> Shop:
        shop = Shop(api, clicked=clicked, key=Key(namespace, name))
        shop.apply()
        return shop

    whole = world("whole")
    counted = Cut(api, None)
    assert drive_to_end(whole, whole.drive(counted))["outcome"] == expected
    control_plane.kubectl("delete", "rollout", "whole", "--namespace", namespace)
    for point in range(1, counted.points + 1):
        shop = world(f"point-{point}")
        with pytest.raises(Killed):
            drive_to_end(shop, shop.drive(Cut(api, point)))
        status = drive_to_end(shop, shop.drive(fence=2))
        assert status["outcome"] == expected, point
        served = "2" if expected == "promoted" else "1"
        assert (shop.target.shares, shop.target.capacity) == ({served: 1.0}, {served}), point
        assert [line["seq"] for line in status["history"]] == list(range(1, len(status["history"]) + 1)), point
        found = shop.object_of(shop.key)
        assert found is not None and not found.finalizers, point
        api.delete(f"/apis/endcap.dev/v1alpha1/namespaces/{namespace}/rollouts/{shop.key.name}")


# ---- the same verbs as on a laptop ----


def endcap(world: World, *arguments: object, code: int = 0) -> str:
    """What ``endcap rollout ... --context`` says."""
    context = world.access.kubectl("config", "current-context").strip()
    ended = subprocess.run(
        [sys.executable, "-m", "endcap.cli", "rollout", *(str(one) for one in arguments), "--context", context,
         "--namespace", world.namespace],
        env=world.access.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    return ended.stdout + ended.stderr


def written(world: World, **spec: Any) -> tuple[Path, Path]:
    """The files that people write, as they lie on a laptop."""
    rollout, objectives = world.folder / "rollout.yaml", world.folder / "objectives.yaml"
    head = {"apiVersion": "endcap.dev/v1alpha1", "metadata": {"name": "shop"}}
    body = {**ROLLOUT, **FAST, "service": "shop", "objectives": "shop", "sticky": None, **spec}
    rollout.write_text(yaml.safe_dump({**head, "kind": "Rollout", "spec": body}))
    objectives.write_text(yaml.safe_dump({**head, "kind": "Objectives", "spec": {**OBJECTIVES, "service": "shop"}}))
    return rollout, objectives


def test_the_command_applies_the_same_files_and_follows_them_to_their_end(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD, "3": WORSE}})
    world.operator()
    freeze = [{"days": ["monday"], "from": "3:00", "until": "3:01", "timezone": "Pacific/Kiritimati"}]
    rollout, objectives = written(world, freeze=freeze)
    assert "version 2 was promoted" in endcap(world, "start", rollout, "--objectives", objectives)
    assert "has ended" in endcap(world, "abort", "shop", code=2)
    told = json.loads(endcap(world, "status", "shop", "--json").partition("\n}\n")[0] + "\n}")
    assert (told["outcome"], told["rollout"], told["namespace"]) == ("promoted", "shop", world.namespace)
    assert "retiring" in endcap(world, "history", "shop")
    rollout, _ = written(world, candidate="models:/recommender/3")
    assert "was rolled back" in endcap(world, "start", rollout, code=4)
    assert world.target()["shares"] == {"2": 1.0}


def test_the_command_steers_it(world: World) -> None:
    world.behave({"shop": {"1": GOOD, "2": GOOD}})
    world.operator()
    world.apply(steps=[{**FAST["steps"][0]}, {**FAST["steps"][1], "approval": True}])
    eventually(lambda: world.status().get("approval") == 2, "it waits for approval")
    endcap(world, "pause", "shop", "--by", "ann")
    assert "nothing waits for approval" in endcap(world, "approve", "shop", code=2)
    endcap(world, "resume", "shop", "--by", "ann")
    eventually(lambda: world.status().get("approval") == 2, "it waits again")
    endcap(world, "approve", "shop", "--by", "bob")
    assert "version 2 was promoted" in endcap(world, "status", "shop", "--watch")
    by = [(line["action"], line["by"]) for line in world.status()["history"] if "by" in line]
    assert by == [("pause", "ann"), ("resume", "ann"), ("approve", "bob")]
    assert "no Rollout 'none'" in endcap(world, "status", "none", code=2)


def test_the_command_says_what_a_refused_rollout_lacks(world: World) -> None:
    world.operator()
    rollout, objectives = written(world)
    said = endcap(world, "start", rollout, "--objectives", objectives, code=2)
    assert "no InferenceService of that name" in said
    assert "next: create it" in said
