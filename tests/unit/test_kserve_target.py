"""The KServe target on a Kubernetes in memory: what is written, in what order, and what is refused."""

import itertools
import re
from pathlib import Path

import pytest

from endcap.errors import CapacityError, FencedError, InputError, StateError, TargetError, VerificationError
from endcap.evidence import Counts
from serving.targets import ModelVersion, StickyKey, VersionObservation
from serving.targets.kserve import FixedDelivery, KServeTarget, Reason, ServiceError, Sizing, Storage
from serving.targets.kserve.cluster import path_of
from serving.targets.kserve.telemetry import Counted, NoTelemetry
from tests.kserve_world import NAMESPACE, SERVICE, Pods, World, service

ONE, TWO, BASELINE = (ModelVersion(label, Path()) for label in ("1", "2", "1-baseline"))
PATH = path_of("inferenceservices", NAMESPACE, SERVICE)
MODE = "serving.kserve.io/deploymentMode"
DELIVERY = FixedDelivery({label: Storage(f"pvc://models/recommender/{label}") for label in ("1", "2", "3")})


def a_world(world: World | None = None, **how: object) -> World:
    world = world or World()
    world.create(path_of("inferenceservices", NAMESPACE), service(**how))
    world.until_serving()
    world.log.clear()
    world.served.clear()
    return world


def target_of(world: World, **settings: object) -> KServeTarget:
    return KServeTarget(world, SERVICE, NAMESPACE, DELIVERY, patience=world.patience, **settings)


def spec(world: World) -> dict:
    return world.objects[PATH]["spec"]


def test_a_version_goes_from_nothing_to_stable_and_every_request_finds_a_pod() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    before = spec(world)["predictor"]
    for share in (0.05, 0.5):
        shares = {TWO: share, ONE: 1 - share}
        target.ensure_capacity(shares, token=token)
        target.set_shares(shares, token=token)
        assert target.observe().shares == {"2": share, "1": pytest.approx(1 - share)}
    target.ensure_capacity({TWO: 1.0}, token=token)
    assert world.replicas("2") == (2, 2)
    target.set_shares({TWO: 1.0}, token=token)
    assert world.served[-1] == {"2": 1.0}
    assert world.replicas("1")[0] >= 2, "the way back is open until it is retired"
    pods = [pod["metadata"]["uid"] for pod in world._pod_objects() if "v2" in pod["metadata"]["name"]]
    target.retire("1", token=token)
    world.until_serving()
    model = {**before["model"], "storageUri": "pvc://models/recommender/2"}
    assert spec(world)["predictor"] == {**before, "name": "v2", "labels": {"endcap.dev/version": "2"}, "model": model,
                                        "annotations": {"endcap.dev/package-sha256": "none"}}  # fmt: skip
    assert spec(world)["canary"] == []
    assert [pod["metadata"]["uid"] for pod in world._pod_objects()] == pods, "no pod restarted"
    assert target.observe().shares == {"2": 1.0}
    assert not [received for received in world.served if any(name.startswith("gone") for name in received)]
    target.retire("1", token=token)
    assert world.replicas("2") == (2, 2)


def test_promoted_at_once_kserve_sends_requests_to_a_service_that_is_gone() -> None:
    """Why the order matters: the stand-in has the real one's gap."""
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    shares = {TWO: 0.3, ONE: 0.7}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    canary = spec(world)["canary"][0]["predictor"]
    world.gateway_runs = False

    def promote(made: dict) -> None:
        made["spec"]["predictor"] |= {"name": "v2", "labels": canary["labels"], "model": canary["model"]}
        made["spec"]["canary"] = []

    world.edit(PATH, promote)
    route = next(one for one in world._of("httproutes") if one["metadata"]["name"] == SERVICE)
    held = {**route["spec"]}
    world.standin._remove_orphans(world.objects[PATH])
    names = [ref["name"] for ref in held["rules"][-1]["backendRefs"] if ref["weight"]]
    assert any(world._deployment(name) is None for name in names)


def test_back_to_stable_leaves_the_service_as_it_was() -> None:
    world = a_world(replicas=3, most=6)
    target = target_of(world)
    token = target.acquire("test")
    before = spec(world)
    shares = {TWO: 0.5, ONE: 0.5}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    for _ in range(2):  # a killed engine does it again
        target.ensure_capacity({ONE: 1.0}, token=token)
        target.set_shares({ONE: 1.0}, token=token)
        target.retire("2", token=token)
    assert {**spec(world), "canary": []} == {**before, "canary": []}
    world.until_serving()
    assert world.replicas("2") == (0, 0)
    assert world.replicas("1") == (3, 3)


def test_the_way_back_waits_for_stables_pods_where_stable_had_shrunk() -> None:
    world = a_world(replicas=4)
    target = target_of(world, sizing=Sizing(keep_stable=False))
    token = target.acquire("test")
    shares = {TWO: 0.75, ONE: 0.25}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    world.settle(5)
    assert world.replicas("1") == (1, 1)
    target.ensure_capacity({ONE: 1.0}, token=token)
    assert world.replicas("1")[1] >= 4
    assert spec(world)["canary"][0]["trafficPercent"] == 75


def test_an_autoscaled_stable_keeps_what_it_had_and_gets_its_bounds_back() -> None:
    world = a_world(World(hpa_wants={"1": 5}), replicas=2, most=6, scaler="hpa")
    target = target_of(world)
    token = target.acquire("test")
    assert world.replicas("1") == (5, 5)
    shares = {TWO: 0.5, ONE: 0.5}
    target.ensure_capacity(shares, token=token)
    assert world.replicas("2") == (3, 3)
    target.set_shares(shares, token=token)
    target.ensure_capacity({TWO: 1.0}, token=token)
    target.set_shares({TWO: 1.0}, token=token)
    target.retire("1", token=token)
    assert (spec(world)["predictor"]["minReplicas"], spec(world)["predictor"]["maxReplicas"]) == (2, 6)
    names = {one["metadata"]["name"] for one in world._of("horizontalpodautoscalers")}
    assert names == {"recommender-v2-predictor"}, "KServe leaves the old one's behind"


def test_a_baseline_is_a_second_canary_with_stables_model() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    shares = {TWO: 0.1, ONE: 0.8, BASELINE: 0.1}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    assert world.served[-1] == {"2": 0.1, "1": 0.8, "1-baseline": 0.1}
    baseline = spec(world)["canary"][1]["predictor"]
    assert baseline["model"]["storageUri"] == spec(world)["predictor"]["model"]["storageUri"]
    target.ensure_capacity({TWO: 1.0}, token=token)
    target.set_shares({TWO: 1.0}, token=token)
    target.retire("1-baseline", token=token)
    target.retire("1", token=token)
    assert spec(world)["canary"] == []


def test_an_older_token_is_refused_by_every_write_and_at_every_moment_of_one() -> None:
    world = a_world()
    target, other = target_of(world), target_of(world)
    token = target.acquire("first")
    newer = other.acquire("second")
    assert newer > token
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


def test_a_token_outlives_a_status_that_was_cleared() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    world.objects[PATH]["status"].pop("annotations")
    with pytest.raises(FencedError):
        target.retire("9", token=token)
    assert target.acquire("again") == token + 1


def test_a_version_that_finds_no_node_is_refused_with_the_schedulers_reason() -> None:
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available."
    world = a_world(World(versions={"2": Pods(unschedulable=reason)}))
    target = target_of(world)
    token = target.acquire("test")
    before = spec(world)
    with pytest.raises(CapacityError, match=r"0 of 3 nodes are available: 3 Insufficient nvidia\.com/gpu"):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    world.settle(10)
    assert {**spec(world), "canary": []} == {**before, "canary": []}
    assert world.replicas("1") == (2, 2)
    assert all(received == {"1": 1.0} for received in world.served)


def test_a_version_that_ends_while_it_starts_is_given_up_long_before_the_deadline() -> None:
    world = a_world(World(versions={"2": Pods(exit_code=3, message="...\nsignature: does not verify")}))
    target = target_of(world)
    token, begun_s = target.acquire("test"), world.now_s
    with pytest.raises(VerificationError, match=r"code 3: signature: does not verify"):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    assert world.now_s - begun_s < 30
    assert spec(world)["canary"] == []
    world.versions["2"] = Pods(exit_code=1, message="boom")
    with pytest.raises(CapacityError, match="ended with code 1: boom"):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)


def test_more_pods_that_cannot_come_leave_the_share_in_force_as_it_is() -> None:
    world = a_world(World(versions={"2": Pods(unschedulable="0/2 nodes are available: cpu.", at_most=1)}), replicas=4)
    target = target_of(world)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.25, ONE: 0.75}, token=token)
    target.set_shares({TWO: 0.25, ONE: 0.75}, token=token)
    with pytest.raises(CapacityError, match="version 2 has 1 of 2 replicas"):
        target.ensure_capacity({TWO: 0.5, ONE: 0.5}, token=token)
    world.settle(5)
    assert world.served[-1] == {"2": 0.25, "1": 0.75}
    assert world.replicas("2") == (1, 1)
    assert world.replicas("1")[1] >= 4


def test_traffic_to_a_version_without_pods_is_refused() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    with pytest.raises(CapacityError, match=r"ensure its capacity first|no ready replica"):
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    world.versions["2"] = Pods(exit_code=1)
    world.settle(2)
    with pytest.raises(CapacityError, match="no ready replica"):
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert all(received == {"1": 1.0} for received in world.served)


def test_a_kserve_that_splits_nothing_is_found_out_by_what_is_observed() -> None:
    world = a_world()
    world.standin.splits = False
    target = target_of(world)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    with pytest.raises(ServiceError, match="still sends all to version 1") as refused:
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert refused.value.reason is Reason.NO_SPLIT
    assert "0.21" in str(refused.value)


def test_a_gateway_that_does_not_take_a_route_up_is_no_fault_of_canarys() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    world.gateway_runs = False
    with pytest.raises(TargetError, match="nothing that the gateway has accepted") as refused:
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert type(refused.value) is TargetError
    world.gateway_runs = True
    target.set_shares({TWO: 0.1, ONE: 0.9}, token=token)
    assert world.served[-1] == {"2": 0.1, "1": 0.9}


def begun(world: World) -> tuple[KServeTarget, int]:
    target = target_of(world)
    token = target.acquire("test")
    shares = {TWO: 0.2, ONE: 0.8}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    return target, token


def test_a_share_changed_by_hand_is_not_written_over_on_the_way_on() -> None:
    world = a_world()
    target, token = begun(world)

    def change(made: dict) -> None:
        made["spec"]["canary"][0]["trafficPercent"] = 60

    world.edit(PATH, change)
    with pytest.raises(ServiceError, match=r"1 replicas, 60 %.*kubectl-edit") as refused:
        target.ensure_capacity({TWO: 0.5, ONE: 0.5}, token=token)
    assert refused.value.reason is Reason.EDITED
    assert spec(world)["canary"][0]["trafficPercent"] == 60
    assert target.observe().shares["2"] == 0.6
    target.ensure_capacity({ONE: 1.0}, token=token)  # the way back is open all the same
    target.set_shares({ONE: 1.0}, token=token)
    target.retire("2", token=token)
    assert spec(world)["canary"] == []


def test_another_stable_by_hand_is_not_taken_back_by_anyone() -> None:
    world = a_world()
    target, token = begun(world)

    def change(made: dict) -> None:
        made["spec"]["predictor"]["model"]["storageUri"] = "pvc://models/hotfix"

    world.edit(PATH, change)
    for shares in ({TWO: 0.5, ONE: 0.5}, {ONE: 1.0}):
        with pytest.raises(ServiceError, match="pvc://models/hotfix"):
            target.ensure_capacity(shares, token=token)


def test_a_service_deleted_and_made_anew_is_another_service() -> None:
    world = a_world()
    target, token = begun(world)
    world.delete(PATH)
    with pytest.raises(ServiceError) as refused:
        target.retire("2", token=token)
    assert refused.value.reason is Reason.NOT_FOUND
    world.seed = 2
    a_world(world)
    with pytest.raises(FencedError):
        target.retire("2", token=token)
    token = target.acquire("anew")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    assert spec(world)["canary"][0]["predictor"]["name"] == "v2"


def test_a_new_process_goes_on_with_what_an_older_one_began() -> None:
    world = a_world(replicas=3)
    begun(world)
    target = target_of(world)
    token = target.acquire("after a crash")
    target.ensure_capacity({ONE: 1.0}, token=token)
    target.set_shares({ONE: 1.0}, token=token)
    target.retire("2", token=token)
    assert spec(world)["predictor"]["minReplicas"] == 3


def test_a_damaged_record_is_not_taken_for_none() -> None:
    world = a_world()
    target, token = begun(world)
    lease = path_of("leases", NAMESPACE, f"endcap-{SERVICE}")
    world.objects[lease]["metadata"]["annotations"]["endcap.dev/rest"] = "{"
    with pytest.raises(StateError, match="damaged"):
        target.retire("2", token=token)


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda made: made["metadata"]["annotations"].pop(MODE), Reason.NOT_STANDARD, "Standard"),
        (lambda made: made["spec"]["predictor"].pop("model"), Reason.NO_MODEL, "ServingRuntime"),
        (lambda made: made["spec"]["predictor"]["model"].pop("storageUri"), Reason.NO_MODEL, "storageUri"),
        (lambda made: made["spec"]["predictor"].pop("name"), Reason.NO_MODEL, "name"),
    ],
)  # fmt: skip
def test_a_service_that_no_canary_can_stand_beside_is_refused_and_left_alone(change, reason, said) -> None:
    world = a_world()
    made = world.objects[PATH]
    change(made)
    before = {**made["spec"]}
    with pytest.raises(ServiceError, match=said) as refused:
        target_of(world).acquire("test")
    assert refused.value.reason is reason
    assert refused.value.next_step
    assert made["spec"] == before
    assert not world._of("leases")


def test_what_the_cluster_lacks_is_said_before_anything_is_changed() -> None:
    with pytest.raises(ServiceError) as refused:
        target_of(World()).acquire("test")
    assert refused.value.reason is Reason.NOT_FOUND
    world = World()
    world.standin.routes = False
    a_world(world)
    with pytest.raises(ServiceError, match="enableGatewayApi: true") as refused:
        target_of(world).acquire("test")
    assert refused.value.reason is Reason.GATEWAY_API_OFF
    world = a_world()
    items = world.items
    world.items = lambda path, **query: None if path.endswith("httproutes") else items(path, **query)
    with pytest.raises(ServiceError, match="no Gateway API") as refused:
        target_of(world).acquire("test")
    assert refused.value.reason is Reason.NO_GATEWAY_API


def test_shares_that_kserve_cannot_set_are_refused_before_anything_is_changed() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    with pytest.raises(InputError, match="whole percents"):
        target.set_shares({TWO: 0.005, ONE: 0.995}, token=token)
    assert world.log == []


def test_a_stable_that_had_no_label_gets_none_before_it_is_replaced() -> None:
    """A label on its template would restart its pods."""
    world = World()
    made = service()
    made["spec"]["predictor"].pop("labels")
    world.create(path_of("inferenceservices", NAMESPACE), made)
    world.until_serving()
    _, _ = begun(world)
    assert "labels" not in spec(world)["predictor"]


def with_own_route(world: World) -> World:
    made = service()
    made["metadata"]["labels"] = {"networking.kserve.io/visibility": "cluster-local"}
    made["metadata"]["annotations"] |= {"endcap.dev/gateway": "shop/edge", "endcap.dev/hostnames": "shop.example.com"}
    world.create(path_of("inferenceservices", NAMESPACE), made)
    world.until_serving()
    return world


def rules(world: World) -> list[dict]:
    return world.objects[path_of("httproutes", NAMESPACE, f"endcap-{SERVICE}")]["spec"]["rules"]


def versions_of(world: World, header: str) -> dict[int, str]:
    """By bucket, the Service that the route sends it to."""
    found: dict[int, str] = {}
    for rule in rules(world)[:-1]:
        match = rule["matches"][0]["headers"][0]
        assert match["name"] == header
        for bucket in range(100):
            if re.fullmatch(match["value"], str(bucket)):
                assert bucket not in found, "a bucket has one version"
                found[bucket] = rule["backendRefs"][0]["name"]
    return found


def test_shoppers_keep_their_version_by_a_route_of_our_own() -> None:
    world = with_own_route(World())
    target = target_of(world)
    token, sticky, before = target.acquire("test"), StickyKey(header="x-bucket"), {}
    assert [ref["name"] for ref in rules(world)[-1]["backendRefs"]] == ["recommender-v1-predictor"]
    for share in (0.1, 0.4):
        shares = {TWO: share, ONE: 1 - 2 * share, BASELINE: share}
        target.ensure_capacity(shares, token=token)
        target.set_shares(shares, token=token, sticky=sticky)
        now = versions_of(world, "x-bucket")
        assert len(now) == 100
        assert sum("v2" in name for name in now.values()) == round(share * 100)
        moved = {(before[bucket], name) for bucket, name in now.items() if before and before[bucket] != name}
        assert all("v1-predictor" in old for old, _ in moved), "only stable's shoppers move"
        before = now
        weights = {ref["name"]: ref["weight"] for ref in rules(world)[-1]["backendRefs"]}
        assert weights["recommender-v2-predictor"] == round(share * 100)
    target.ensure_capacity({TWO: 1.0}, token=token)
    target.set_shares({TWO: 1.0}, token=token, sticky=sticky)
    target.retire("1-baseline", token=token)
    target.retire("1", token=token)
    assert [ref["name"] for ref in rules(world)[-1]["backendRefs"]] == ["recommender-v2-predictor"]
    assert not [received for received in world.served if any(name.startswith("gone") for name in received)]


def test_a_rule_of_our_route_keeps_its_place_and_its_version() -> None:
    """A gateway calls its clusters by rules' places, and takes up what is in one before it takes up what it is sent."""
    world = with_own_route(World())
    target = target_of(world)
    token, sticky = target.acquire("test"), StickyKey(header="x-bucket")
    seen: list[list[tuple[str, set[str]]]] = []

    def note() -> None:
        made = [(rule["matches"][0].get("headers", [{"value": ".*"}])[0]["value"],
                 {ref["name"] for ref in rule["backendRefs"]}) for rule in rules(world)]  # fmt: skip
        seen.append(made)
        for value, names in made:
            assert all(world._deployment(name) is not None for name in names), "a Service that is not there is named"
            assert (value == "a^") == (not any(re.fullmatch(value, str(bucket)) for bucket in range(100)))

    note()
    for share in (0.2, 0.6, 1.0):
        shares = {TWO: share, **({ONE: 1 - share} if share < 1 else {})}
        target.ensure_capacity(shares, token=token)
        note()
        target.set_shares(shares, token=token, sticky=sticky)
        note()
    target.retire("1", token=token)
    token = target.acquire("another")
    note()
    one, two = "recommender-v1-predictor", "recommender-v2-predictor"
    assert [len(made) for made in seen] == [4] * len(seen)
    for before, after in itertools.pairwise(seen):
        for (_, had), (value, has) in zip(before[:-1], after[:-1], strict=True):
            assert value == "a^" or had == has, "what gets requests was there before it got them"
    assert seen[1][1] == ("a^", {two}), "known to the gateway before its first request"
    assert [{name for _, names in made for name in names} for made in (seen[0], seen[2], seen[-1])] == [
        {one}, {one, two}, {two},
    ]  # fmt: skip


def test_copies_go_to_a_version_without_a_share_and_are_nobodys_requests() -> None:
    world = with_own_route(World())
    counted = Counted({"1": VersionObservation(attempts=Counts(90, 90), requests=Counts(90, 90)),
                       "2": VersionObservation(attempts=Counts(40, 50), requests=Counts(40, 50))})  # fmt: skip

    class Fixed(NoTelemetry):
        def observe(self, pods, *, shoppers_since_s=None) -> Counted:
            return counted

    target = target_of(world, telemetry=Fixed())
    token = target.acquire("test")
    with pytest.raises(CapacityError):
        target.set_shadow(TWO, share=0.5, token=token)
    target.ensure_capacity({TWO: 0.5}, token=token)
    target.set_shadow(TWO, share=0.5, token=token)
    mirror = rules(world)[-1]["filters"][0]["requestMirror"]
    assert mirror == {"backendRef": {"group": "", "kind": "Service", "name": "recommender-v2-predictor", "port": 80},
                      "percent": 50}  # fmt: skip
    seen = target.observe()
    assert seen.shadow is not None
    assert (seen.shadow.version, seen.shadow.answered) == ("2", Counts(40, 50))
    assert seen.versions["2"].attempts == Counts()
    assert seen.outcomes == Counts(90, 90)
    target.set_shadow(None, token=token)
    assert "filters" not in rules(world)[-1]
    assert target.observe().versions["2"].attempts == Counts(), "copies do not become requests when copying ends"


def test_what_kserves_route_cannot_do_is_refused_with_the_way_to_have_it() -> None:
    world = a_world()
    target = target_of(world)
    token = target.acquire("test")
    target.set_shadow(None, token=token)
    bucket = StickyKey(header="x-bucket")
    for refused in (
        lambda: target.check_asked(sticky=bucket, shadow=False, baseline=False),
        lambda: target.check_asked(sticky=None, shadow=True, baseline=False),
        lambda: target.set_shadow(TWO, share=0.1, token=token),
        lambda: target.set_shares({TWO: 0.1, ONE: 0.9}, token=token, sticky=bucket),
    ):
        with pytest.raises(InputError, match="KServe's routes cannot") as said:
            refused()
        assert "endcap.dev/gateway" in str(said.value)
    target.set_shares({ONE: 1.0}, token=token, sticky=bucket)  # the way back is open whatever was asked for
    world = with_own_route(World())
    target = target_of(world)
    token = target.acquire("test")
    with pytest.raises(InputError, match="cookie"):
        target.set_shares({TWO: 0.1, ONE: 0.9}, token=token, sticky=StickyKey(cookie="session"))


def test_an_older_writer_does_not_write_the_route_either() -> None:
    world = with_own_route(World())
    target, other = target_of(world), target_of(world)
    token = target.acquire("first")
    taken = []

    def another_takes_over(verb: str, path: str) -> None:
        if verb == "apply" and path.endswith(f"endcap-{SERVICE}") and not taken:
            taken.append(True)
            other.acquire("second")

    world.before_write = another_takes_over
    with pytest.raises(FencedError):
        target.set_shares({ONE: 1.0}, token=token)


def test_a_version_is_served_by_the_package_that_was_registered_and_no_other() -> None:
    world = a_world()
    digest = "ab" * 32
    delivery = FixedDelivery({"2": Storage("mlflow://recommender/2", digest)})
    target = KServeTarget(world, SERVICE, NAMESPACE, delivery, patience=world.patience)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.8, BASELINE: 0.1}, token=token)
    said = {one["predictor"]["name"]: one["predictor"]["annotations"] for one in spec(world)["canary"]}
    assert said == {"v2": {"endcap.dev/package-sha256": digest},
                    "v1-baseline": {"endcap.dev/package-sha256": "none"}}  # fmt: skip
    pods = {pod["metadata"]["labels"]["endcap.dev/version"] for pod in world._pod_objects()}
    assert pods == {"1", "2", "1-baseline"}


def test_the_gateway_is_told_to_try_again_unless_somebody_tells_it_already() -> None:
    world = a_world()
    path = path_of("backendtrafficpolicies", NAMESPACE)
    target_of(world, policy=True).acquire("test")
    made = world.objects[f"{path}/endcap-{SERVICE}"]["spec"]
    assert {ref["name"] for ref in made["targetRefs"]} == {SERVICE, f"{SERVICE}-predictor"}
    assert made["retry"]["numRetries"] == 2
    assert made["healthCheck"]["passive"]["consecutiveLocalOriginFailures"] == 1
    assert "zoneAware" not in made["loadBalancer"], "a cluster a version loses requests when it is made"
    world = with_own_route(World())
    target_of(world, policy=True).acquire("test")
    refs = world.objects[f"{path}/endcap-{SERVICE}"]["spec"]["targetRefs"]
    assert [ref["name"] for ref in refs] == [f"endcap-{SERVICE}"]
    world = a_world()
    theirs = {"metadata": {"name": "theirs"}, "spec": {"targetRefs": [{"name": SERVICE}]}}
    world.create(path, theirs)
    target_of(world, policy=True).acquire("test")
    assert [one["metadata"]["name"] for one in world._of("backendtrafficpolicies")] == ["theirs"]
