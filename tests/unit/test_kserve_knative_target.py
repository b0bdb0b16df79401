"""A service in Knative mode as a target: what is written, in what order, by the real engine too, cut off anywhere."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from endcap.errors import CapacityError, FencedError, InputError, TargetError, VerificationError
from endcap.objectives import Good, Objective, Objectives
from serving.operator.kserve import KServeOutfit
from serving.operator.settings import Settings
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.state import Outcome
from serving.targets import ModelVersion, StickyKey
from serving.targets.kserve import FixedDelivery, KnativeTarget, KServeTarget, Reason, ServiceError, Storage, target_for
from serving.targets.kserve.cluster import path_of
from tests.knative_world import KSVCS, KnativeWorld, ServedCounts, knative_service, template_of
from tests.kserve_world import NAMESPACE, SERVICE, Pods, World, service
from tests.simulated import Killed

ONE, TWO, THREE, BASELINE = (ModelVersion(label, Path()) for label in ("1", "2", "3", "1-baseline"))
PATH = path_of("inferenceservices", NAMESPACE, SERVICE)
LEASE = path_of("leases", NAMESPACE, f"endcap-{SERVICE}")
DELIVERY = FixedDelivery({label: Storage(f"pvc://models/recommender/{label}") for label in ("2", "3")})
REVISION = f"{SERVICE}-predictor-0000"
OBJECTIVES = Objectives("shop", SERVICE, (Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None),))
SPEC = RolloutSpec(
    "shop", SERVICE, "models:/recommender/2", "shop", tuple(Step(share, 100, 5, 240) for share in (0.1, 0.5, 1.0)),
    0.05, 0.05, 1.0,
)  # fmt: skip


def a_world(world: KnativeWorld | None = None, **how: object) -> KnativeWorld:
    """Version 0 served before version 1: the one that a revision which is split with itself falls back to."""
    world = world or KnativeWorld()
    world.create(path_of("inferenceservices", NAMESPACE), knative_service(version="0", **how))
    world.until_serving()

    def next_version(made: dict[str, Any]) -> None:
        made["spec"]["predictor"]["labels"]["endcap.dev/version"] = "1"
        made["spec"]["predictor"]["model"]["storageUri"] = "pvc://models/recommender/1"

    world.edit(PATH, next_version)
    world.until_serving()
    for log in (world.log, world.served, world.held, world.requests):
        log.clear()
    assert component(world)["latestRolledoutRevision"] == f"{REVISION}2"
    return world


def target_of(world: KnativeWorld) -> KnativeTarget:
    target = target_for(world, SERVICE, NAMESPACE, DELIVERY, telemetry=ServedCounts(world), patience=world.patience,
                        clock=lambda: world.now_s)  # fmt: skip
    assert isinstance(target, KnativeTarget)
    return target


def predictor(world: KnativeWorld) -> dict[str, Any]:
    return world.objects[PATH]["spec"]["predictor"]


def component(world: KnativeWorld) -> dict[str, Any]:
    return world.objects[PATH]["status"]["components"]["predictor"]


def begun(world: KnativeWorld, share: float = 0.2) -> tuple[KnativeTarget, int]:
    target = target_of(world)
    token = target.acquire("test")
    shares = {TWO: share, ONE: 1 - share}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    return target, token


def written(world: KnativeWorld) -> list[tuple[str, int | None]]:
    """Version and ``canaryTrafficPercent`` of each write."""
    said = [(spec["predictor"]["labels"]["endcap.dev/version"], spec["predictor"].get("canaryTrafficPercent"))
            for spec in world.log]  # fmt: skip
    return list(dict.fromkeys(said))


# ---- which target ----


def test_a_service_gets_the_target_of_the_mode_that_kserve_serves_it_in() -> None:
    for mode in ("Knative", "Serverless"):
        world = KnativeWorld()
        world.create(path_of("inferenceservices", NAMESPACE), knative_service(mode=mode))
        assert isinstance(target_for(world, SERVICE, NAMESPACE, DELIVERY), KnativeTarget)
    world = KnativeWorld()
    unannotated = knative_service()
    del unannotated["metadata"]["annotations"]["serving.kserve.io/deploymentMode"]
    world.create(path_of("inferenceservices", NAMESPACE), unannotated | {"status": {"deploymentMode": "Knative"}})
    assert isinstance(target_for(world, SERVICE, NAMESPACE, DELIVERY), KnativeTarget), "what KServe does by default"
    for made in (service(), service(mode="ModelMesh")):
        standard = World()
        standard.create(path_of("inferenceservices", NAMESPACE), made)
        assert isinstance(target_for(standard, SERVICE, NAMESPACE, DELIVERY), KServeTarget)
    with pytest.raises(ServiceError, match="ModelMesh"):
        target_for(standard, SERVICE, NAMESPACE, DELIVERY).check()
    with pytest.raises(ServiceError) as refused:
        target_for(World(), SERVICE, NAMESPACE, DELIVERY).check()
    assert refused.value.reason is Reason.NOT_FOUND


def test_the_operator_makes_it_and_refuses_what_knative_cannot_do_before_anything_is_written() -> None:
    world = a_world()
    outfit = KServeOutfit(world, Settings())
    equipment = outfit(NAMESPACE, SPEC, OBJECTIVES)
    assert isinstance(equipment.target, KnativeTarget)
    equipment.close()
    for asked in (replace(SPEC, baseline=True), replace(SPEC, sticky=StickyKey(header="x-bucket"))):
        with pytest.raises(InputError, match="Knative cannot"):
            outfit(NAMESPACE, asked, OBJECTIVES).check()
    assert world.log == []


# ---- the ways of a version ----


def test_a_version_goes_from_a_revision_without_traffic_to_stable() -> None:
    world = a_world()
    before = predictor(world)
    target, token = begun(world, 0.1)
    assert component(world)["traffic"][0] == {"revisionName": f"{REVISION}3", "latestRevision": True, "percent": 10}
    assert target.observe().shares == {"2": 0.1, "1": 0.9}
    assert target.observe().versions["2"].ready_replicas == 2
    target.ensure_capacity({TWO: 1.0}, token=token)
    with pytest.raises(TargetError, match="still has a share"):
        target.retire("1", token=token)
    target.set_shares({TWO: 1.0}, token=token)
    assert world.served[-1] == {"2": 1.0}
    pods = {pod["metadata"]["uid"] for pod in world._pod_objects() if f"{REVISION}3" in pod["metadata"]["name"]}
    target.retire("1", token=token)
    world.until_serving()
    assert predictor(world) == {
        **before, "labels": {"endcap.dev/version": "2"}, "annotations": {"endcap.dev/package-sha256": "none"},
        "model": {**before["model"], "storageUri": "pvc://models/recommender/2"},
    }  # fmt: skip
    assert {pod["metadata"]["uid"] for pod in world._pod_objects() if pod["metadata"]["uid"] in pods} == pods
    assert component(world)["latestCreatedRevision"] == f"{REVISION}3", "the promotion made no revision"
    assert written(world) == [("2", 0), ("2", 10), ("2", 100), ("2", None)]
    assert '"wishes":[]' in world.objects[LEASE]["metadata"]["annotations"]["endcap.dev/rest"]
    assert world.held == [], "no request waited for a pod"
    target.retire("1", token=token)


def test_the_way_back_returns_the_traffic_before_the_model_and_leaves_the_service_as_it_was() -> None:
    world = a_world()
    before = predictor(world)
    target, token = begun(world, 0.5)
    with pytest.raises(TargetError, match="still has a share"):
        target.retire("2", token=token)
    for _ in range(2):  # a killed engine does it again
        target.ensure_capacity({ONE: 1.0}, token=token)
        target.set_shares({ONE: 1.0}, token=token)
        target.retire("2", token=token)
    assert predictor(world) == before
    assert written(world) == [("2", 0), ("2", 50), ("1", 0), ("1", None)]
    assert world.served[-1] == {"1": 1.0}
    assert template_of(world, component(world)["latestRolledoutRevision"]) == template_of(world, f"{REVISION}2")
    assert world.held == []


def test_the_way_back_from_all_the_traffic_wakes_stables_pods_with_one_percent_first() -> None:
    world = a_world()
    target, token = begun(world)
    target.ensure_capacity({TWO: 1.0}, token=token)
    target.set_shares({TWO: 1.0}, token=token)
    for _ in range(100):
        world.pass_time(1)
    assert world.replicas("1")[0] == 0, "Knative took away what has no traffic"
    target.ensure_capacity({ONE: 1.0}, token=token)
    assert predictor(world)["canaryTrafficPercent"] == 99
    target.set_shares({ONE: 1.0}, token=token)
    assert world.served[-1] == {"1": 1.0}
    assert world.held
    assert {percent for _, percent in world.held} == {0.01}
    target.retire("2", token=token)
    assert "canaryTrafficPercent" not in predictor(world)


def test_where_stables_pods_do_not_come_back_canary_keeps_all_of_it() -> None:
    world = a_world()
    target, token = begun(world)
    target.ensure_capacity({TWO: 1.0}, token=token)
    target.set_shares({TWO: 1.0}, token=token)
    for _ in range(100):
        world.pass_time(1)
    world.versions["1"] = Pods(start_s=10_000)
    with pytest.raises(CapacityError, match="version 1 has 0 of 2 replicas"):
        target.ensure_capacity({ONE: 1.0}, token=token)
    assert predictor(world)["canaryTrafficPercent"] == 100


def test_a_service_that_scales_to_zero_is_rolled_out_on_too() -> None:
    world = a_world(replicas=0)
    for _ in range(100):
        world.pass_time(1)
    target, token = begun(world)
    assert world.served[-1] == {"2": 0.2, "1": 0.8}
    target.set_shares({ONE: 1.0}, token=token)
    target.retire("2", token=token)
    assert world.served[-1] == {"1": 1.0}


# ---- versions that do not come up ----


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        (Pods(exit_code=3, message="signature: does not verify"), VerificationError, "code 3: signature"),
        (Pods(exit_code=1, message="boom"), CapacityError, "does not start: .*boom"),
        (Pods(unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu."), CapacityError,
         r"0 of 3 nodes are available: 3 Insufficient nvidia\.com/gpu"),
    ],
)  # fmt: skip
def test_a_version_that_does_not_come_up_is_refused_by_its_reason_and_stable_serves_as_before(
    how: Pods, kind: type[Exception], said: str
) -> None:
    world = a_world(KnativeWorld(versions={"2": how}))
    before = predictor(world)
    target = target_of(world)
    token = target.acquire("test")
    with pytest.raises(kind, match=said):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    assert predictor(world) == before
    assert {tuple(received) for received in world.served} == {("1",)}
    world.versions.clear()
    target.ensure_capacity({THREE: 0.1, ONE: 0.9}, token=token)
    target.set_shares({THREE: 0.1, ONE: 0.9}, token=token)
    assert world.served[-1] == {"3": 0.1, "1": 0.9}


def test_a_version_that_kserve_never_took_up_is_taken_back_in_one_write() -> None:
    """Split with itself, stable's revision would lose its traffic to version 0."""
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    world.refuses_services = True
    with pytest.raises(CapacityError, match="version 2 has 0 of 2"):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    assert written(world) == [("2", 0), ("1", None)]
    world.refuses_services = False
    world.until_serving()
    assert {tuple(received) for received in world.served} == {("1",)}


def test_a_revision_that_is_split_with_itself_loses_its_traffic_to_the_one_before() -> None:
    """Why that matters: the world has KServe's trap."""
    world = a_world()

    def split(made: dict[str, Any]) -> None:
        made["spec"]["predictor"]["canaryTrafficPercent"] = 0

    world.edit(PATH, split)
    world.until_serving()
    assert world.served[-1] == {"0": 1.0}


def test_where_kserve_itself_falls_into_its_trap_no_share_is_given_and_the_way_back_mends_it() -> None:
    world = a_world(KnativeWorld(configuration_lags=True))
    target = target_of(world)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    with pytest.raises(TargetError, match="90 % for version 0"):
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    target.ensure_capacity({ONE: 1.0}, token=token)
    target.set_shares({ONE: 1.0}, token=token)
    target.retire("2", token=token)
    assert world.served[-1] == {"1": 1.0}


def test_traffic_to_a_version_without_a_ready_revision_is_refused() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    with pytest.raises(CapacityError, match="no ready replica"):
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    world.versions["2"] = Pods(exit_code=1)
    world.settle(2)
    with pytest.raises(CapacityError, match="no ready replica"):
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert {tuple(received) for received in world.served} == {("1",)}


def test_a_route_that_knative_does_not_set_up_is_no_fault_of_canarys() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    world.gateway_runs = False
    with pytest.raises(TargetError, match="has not set up its routes") as refused:
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert type(refused.value) is TargetError
    world.gateway_runs = True
    target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert world.served[-1] == {"2": 0.1, "1": 0.9}


# ---- what is refused ----


def test_what_knative_cannot_do_is_refused_with_the_way_to_go_on() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    target.set_shadow(None, token=token)
    two_more = {TWO: 0.1, ONE: 0.8, BASELINE: 0.1}
    for refused in (
        lambda: target.set_shadow(TWO, share=0.1, token=token),
        lambda: target.set_shares({TWO: 0.1, ONE: 0.9}, token=token, sticky=StickyKey(header="x-bucket")),
        lambda: target.ensure_capacity(two_more, token=token), lambda: target.set_shares(two_more, token=token),
        lambda: target.check_asked(sticky=None, shadow=False, baseline=True),
    ):  # fmt: skip
        with pytest.raises(InputError, match="Knative cannot") as said:
            refused()
        assert "leave" in str(said.value)
    with pytest.raises(InputError, match="whole percents"):
        target.set_shares({TWO: 0.005, ONE: 0.995}, token=token)
    assert world.log == []


def change(path: tuple[str, ...], value: object) -> Callable[[dict[str, Any]], None]:
    def done(made: dict[str, Any]) -> None:
        for key in path[:-1]:
            made = made[key]
        if value is None:
            del made[path[-1]]
        else:
            made[path[-1]] = value

    return done


PREDICTOR = ("spec", "predictor")


@pytest.mark.parametrize(
    ("edit", "reason", "said"),
    [
        (change((*PREDICTOR, "model", "storageUri"), None), Reason.NO_MODEL, "storageUri"),
        (change((*PREDICTOR, "labels"), None), Reason.NO_MODEL, "endcap.dev/version"),
        (change((*PREDICTOR, "canaryTrafficPercent"), 30), Reason.SPLIT, "canaryTrafficPercent is 30"),
        (change(("metadata", "deletionTimestamp"), "2026-12-01T00:00:00Z"), Reason.NOT_FOUND, "no such service"),
        (change(("status", "deploymentMode"), "Standard"), Reason.NOT_STANDARD, "its mode is Standard now"),
    ],
)  # fmt: skip
def test_a_service_that_is_no_ground_for_a_rollout_is_refused_and_nothing_is_changed(
    edit: Callable[[dict[str, Any]], None], reason: Reason, said: str
) -> None:
    world = a_world()
    target = target_of(world)
    world.edit(PATH, edit)
    world.log.clear()
    with pytest.raises(ServiceError, match=said) as refused:
        target.acquire("test")
    assert refused.value.reason is reason
    assert world.log == []
    assert LEASE not in world.objects


def test_no_knative_is_told_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = a_world()
    items = world.items
    monkeypatch.setattr(world, "items", lambda path, **how: None if "/revisions" in path else items(path, **how))
    with pytest.raises(ServiceError, match="no Knative") as refused:
        target_of(world).acquire("test")
    assert refused.value.reason is Reason.NO_KNATIVE


def test_a_service_whose_newest_revision_is_not_ready_is_not_begun_on() -> None:
    world = a_world(KnativeWorld(versions={"3": Pods(start_s=10_000)}))
    world.edit(PATH, change((*PREDICTOR, "labels", "endcap.dev/version"), "3"))
    world.until_serving()
    world.log.clear()
    target = target_of(world)
    token = target.acquire("test")
    with pytest.raises(TargetError, match="version 3 is not rolled out yet"):
        target.ensure_capacity({TWO: 0.1, ModelVersion("3", Path()): 0.9}, token=token)
    assert world.log == []


# ---- other writers ----


def test_an_older_token_is_refused_by_every_write_and_at_every_moment_of_one() -> None:
    world = a_world()
    target, other = target_of(world), target_of(world)
    token = target.acquire("first")
    assert other.acquire("second") > token
    shares = {TWO: 0.1, ONE: 0.9}
    for write in (
        lambda: target.ensure_capacity(shares, token=token), lambda: target.set_shares(shares, token=token),
        lambda: target.retire("1", token=token), lambda: target.set_shadow(None, token=token),
    ):  # fmt: skip
        with pytest.raises(FencedError):
            write()
    assert world.log == []
    token, taken = other.acquire("third"), []

    def another_takes_over(verb: str, path: str) -> None:
        if verb == "apply" and path == PATH and not taken:
            taken.append(True)
            target.acquire("fourth")

    world.before_write = another_takes_over
    with pytest.raises(FencedError):  # it had read the service, and slept
        other.ensure_capacity(shares, token=token)
    assert world.log == []


def test_a_share_changed_by_hand_is_not_written_over_and_does_not_close_the_way_back() -> None:
    world = a_world()
    target, token = begun(world)
    world.edit(PATH, change((*PREDICTOR, "canaryTrafficPercent"), 60))
    with pytest.raises(ServiceError, match=r"60 %.*kubectl-edit") as refused:
        target.ensure_capacity({TWO: 0.5, ONE: 0.5}, token=token)
    assert refused.value.reason is Reason.EDITED
    assert target.observe().shares["2"] == 0.6
    for write in (
        lambda: target.ensure_capacity({ONE: 1.0}, token=token), lambda: target.set_shares({ONE: 1.0}, token=token),
        lambda: target.retire("2", token=token),
    ):  # fmt: skip
        write()
    assert world.served[-1] == {"1": 1.0}


def test_a_model_of_somebody_elses_that_gets_everything_is_not_taken_back_by_anyone() -> None:
    world = a_world()
    target, token = begun(world)
    world.edit(PATH, change((*PREDICTOR, "model", "storageUri"), "pvc://models/hotfix"))
    world.edit(PATH, change((*PREDICTOR, "canaryTrafficPercent"), None))
    for shares in ({TWO: 0.5, ONE: 0.5}, {ONE: 1.0}):
        with pytest.raises(ServiceError, match="pvc://models/hotfix"):
            target.ensure_capacity(shares, token=token)
    assert predictor(world)["model"]["storageUri"] == "pvc://models/hotfix"


def test_more_replicas_by_hand_make_a_revision_of_the_same_version_and_disturb_nothing() -> None:
    world = a_world()
    target, token = begun(world)
    world.edit(PATH, change((*PREDICTOR, "minReplicas"), 4))
    world.until_serving()
    target.ensure_capacity({TWO: 0.5, ONE: 0.5}, token=token)
    target.set_shares({TWO: 0.5, ONE: 0.5}, token=token)
    assert world.served[-1] == {"2": 0.5, "1": 0.5}
    assert predictor(world)["minReplicas"] == 4


# ---- the real engine ----


class Clock:
    """The engine's, by the world's time: what it waits, controllers work."""

    def __init__(self, world: KnativeWorld) -> None:
        self._world = world

    def now_s(self) -> float:
        return self._world.now_s

    def wait(self, seconds: float) -> None:
        self._world.pass_time(seconds)


class Dying:
    """The API, which the process that writes does not survive a write of: before it, or after. (Reads change nothing:
    to be killed between two of them is to be killed before the next write.)"""

    def __init__(self, world: KnativeWorld, at: int | None = None, *, after: bool = False) -> None:
        self._world, self._at, self._after, self.writes = world, at, after, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._world, name)
        if name not in ("create", "replace", "apply", "merge", "delete"):
            return found

        def called(*arguments: Any, **named: Any) -> Any:
            self.writes += 1
            if self.writes == self._at and not self._after:
                raise Killed
            answer = found(*arguments, **named)
            if self.writes == self._at:
                raise Killed
            return answer

        return called


def roll(world: KnativeWorld, folder: Path, api: Dying | None = None, spec: RolloutSpec = SPEC) -> RolloutResult:
    target = target_for(api or Dying(world), SERVICE, NAMESPACE, DELIVERY, telemetry=ServedCounts(world),
                        patience=world.patience, clock=lambda: world.now_s)  # fmt: skip
    return run_rollout(spec, OBJECTIVES, TWO, target, folder, packages={"1": Path("one")}, clock=Clock(world))


def is_promoted(world: KnativeWorld) -> None:
    world.until_serving()
    assert world.served[-1] == {"2": 1.0}
    assert predictor(world)["model"]["storageUri"] == "pvc://models/recommender/2"
    is_settled(world)


def is_back(world: KnativeWorld) -> None:
    world.until_serving()
    assert world.served[-1] == {"1": 1.0}
    assert predictor(world) == {**knative_service(version="1")["spec"]["predictor"]}
    is_settled(world)


def is_settled(world: KnativeWorld) -> None:
    assert "canaryTrafficPercent" not in predictor(world)
    assert '"wishes":[]' in world.objects[LEASE]["metadata"]["annotations"]["endcap.dev/rest"]
    assert "0" not in {label for received in world.served for label in received}, "nobody got the version before"
    assert [key for key in world.objects if key.startswith(f"{KSVCS}/")] == [f"{KSVCS}/{SERVICE}-predictor"]


def test_a_good_version_is_promoted(tmp_path: Path) -> None:
    world = a_world()
    assert roll(world, tmp_path).outcome is Outcome.PROMOTED
    is_promoted(world)
    assert written(world) == [("2", 0), ("2", 10), ("2", 50), ("2", 100), ("2", None)]
    assert world.held == []


def test_a_version_that_fails_its_shoppers_is_rolled_back(tmp_path: Path) -> None:
    world = a_world(KnativeWorld(answered={"2": 0.8}))
    result = roll(world, tmp_path)
    assert result.outcome is Outcome.ROLLED_BACK
    assert "availability" in result.reason
    is_back(world)
    assert world.held == []


def test_one_that_cannot_start_ends_with_its_reason_and_no_shopper_saw_it(tmp_path: Path) -> None:
    world = a_world(KnativeWorld(versions={"2": Pods(exit_code=3, message="signature: does not verify")}))
    result = roll(world, tmp_path)
    assert result.outcome is Outcome.REFUSED
    assert "does not verify" in result.reason
    is_back(world)
    assert "2" not in world.requests


def test_what_knative_cannot_do_ends_a_rollout_that_asks_for_it_with_stable_untouched(tmp_path: Path) -> None:
    world = a_world()
    result = roll(world, tmp_path, spec=replace(SPEC, baseline=True))
    assert result.outcome is not Outcome.PROMOTED
    assert "Knative cannot split" in result.reason
    assert world.log == []


def worlds(how: str) -> tuple[KnativeWorld, Callable[[KnativeWorld], None], Outcome]:
    if how == "promoted":
        return a_world(), is_promoted, Outcome.PROMOTED
    if how == "rolled back":
        return a_world(KnativeWorld(answered={"2": 0.8})), is_back, Outcome.ROLLED_BACK
    crashing = Pods(exit_code=1, message="boom")
    return a_world(KnativeWorld(versions={"2": crashing})), is_back, Outcome.REFUSED


def crash_points(tmp_path: Path, how: str) -> Iterator[int]:
    world, _, _ = worlds(how)
    api = Dying(world)
    roll(world, tmp_path / "whole", api)
    return iter(range(1, api.writes + 1))


@pytest.mark.parametrize("how", ["promoted", "rolled back", "refused"])
def test_an_engine_killed_at_any_write_is_gone_on_with_by_another(how: str, tmp_path: Path) -> None:
    for at in crash_points(tmp_path, how):
        for after in (False, True):
            world, is_there, outcome = worlds(how)
            folder = tmp_path / f"{at}{after}"
            with pytest.raises(Killed):
                roll(world, folder, Dying(world, at, after=after))
            assert roll(world, folder).outcome is outcome, f"killed at write {at}"
            is_there(world)
