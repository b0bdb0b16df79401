"""Plans for an InferenceService, held against a model of KServe's arithmetic: capacity before traffic, always."""

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endcap.errors import InputError, TargetError
from serving.targets.kserve import plan
from serving.targets.kserve.plan import Canary, Predictor, Rest, Sizing, Spec, There, Workload

STABLE, CANARY, BASELINE = "1", "2", "1-baseline"


def predictor(label: str) -> Predictor:
    return Predictor(label, f"v{label}", f"pvc://models/{label}")


VERSIONS = {label: predictor(label) for label in (CANARY, BASELINE)}


@dataclass
class Modelled:
    """KServe's Standard mode, as its source has it; pods come one at a time, when they are told to."""

    spec: Spec
    pods: dict[str, int] = field(default_factory=dict)
    hpa: bool = False
    hpa_wants: int = 0
    """What stable's autoscaler would choose between its bounds."""
    ready: frozenset[str] = frozenset()
    rest: Rest | None = None
    broken: frozenset[str] = frozenset()
    most_of_stable: int = 0

    def __post_init__(self) -> None:
        self.pods = self.pods or {self.spec.stable.label: max(1, self.spec.min_replicas or 1, self.hpa_wants)}

    def admit(self, wish: Spec) -> None:
        """The webhook's refusals."""
        least = 1 if wish.min_replicas is None else wish.min_replicas
        names = [wish.stable.name, *(canary.predictor.name for canary in wish.canaries)]
        assert len(set(names)) == len(names)
        assert sum(canary.percent for canary in wish.canaries) <= 100
        assert all(0 <= canary.replicas <= least for canary in wish.canaries), "more replicas than stable's minimum"
        assert wish.max_replicas is None or wish.max_replicas >= least
        if self.rest is None and wish.canaries:
            self.rest = plan.begin_rest(self.there)
        self.spec = wish
        if not wish.canaries:
            self.rest = None

    def wanted(self, label: str) -> int:
        """Replicas of its Deployment."""
        canary = self.spec.canary(label)
        if canary is not None:
            return canary.replicas
        least = 1 if self.spec.min_replicas is None else self.spec.min_replicas
        taken = sum(one.replicas for one in self.spec.canaries if one.predictor.label in self.ready)
        if taken and self.spec.min_replicas is not None:
            least = max(least - taken, 1)
        if not self.hpa:
            return least
        most = max(self.spec.max_replicas or 0, least)
        return min(max(self.hpa_wants, least), most)

    def reconcile(self, *, a_pod_more: bool) -> None:
        labels = {self.spec.stable.label, *(canary.predictor.label for canary in self.spec.canaries)}
        self.pods = {label: count for label, count in self.pods.items() if label in labels}
        self.ready = frozenset(
            one.predictor.label for one in self.spec.canaries if self.pods.get(one.predictor.label, 0) > 0
        )
        for label in labels:
            has, wanted = self.pods.get(label, 0), self.wanted(label)
            if has > wanted:
                self.pods[label] = wanted  # surplus goes at once; what is missing takes its time
            elif has < wanted and a_pod_more and label not in self.broken:
                self.pods[label] = has + 1
        self.most_of_stable = max(self.most_of_stable, self.pods.get(STABLE, 0))

    @property
    def there(self) -> There:
        workloads = {label: Workload(self.wanted(label), count, count) for label, count in self.pods.items()}
        return There(self.spec, workloads, self.ready, self.rest)

    def share(self, label: str) -> float:
        """What it receives: an unready canary's share is stable's."""
        given = {one.predictor.label: one.percent for one in self.spec.canaries if one.predictor.label in self.ready}
        return given.get(label, 0) / 100 if label != self.spec.stable.label else (100 - sum(given.values())) / 100


def ensure(world: Modelled, shares: dict[str, float], sizing: Sizing, *, patience: int = 60) -> bool:
    """The target's loop. True when capacity is there."""
    needed = plan.needs(world.there, shares, sizing)
    for turn in range(patience):
        wish = plan.grow(world.there, VERSIONS, needed)
        if wish != world.spec:
            world.admit(wish)
        elif not plan.short_of(world.there, needed):
            return True
        world.reconcile(a_pod_more=turn % 2 == 1)
        carries(world)
    return False


def carries(world: Modelled) -> None:
    """Nobody's share is more than its pods carry, while each pod carries what it carried at rest."""
    rest = world.rest or plan.begin_rest(world.there)
    total = max(1, rest.min_replicas or 1)
    for label, count in world.pods.items():
        assert count >= math.ceil(world.share(label) * total - 1e-9), (label, world)


steps = st.lists(st.integers(1, 99), min_size=1, max_size=4).map(sorted)


@settings(max_examples=300, deadline=None)
@given(
    least=st.one_of(st.none(), st.integers(1, 7)), above=st.integers(0, 5), hpa=st.booleans(),
    percents=steps, keep=st.booleans(), with_baseline=st.booleans(), ending=st.sampled_from(["promote", "back"]),
)  # fmt: skip
def test_a_rollout_never_gives_traffic_to_pods_that_are_not_there(
    least: int | None, above: int, hpa: bool, percents: list[int], keep: bool, with_baseline: bool, ending: str
) -> None:
    most = None if least is None or above == 0 else least + above
    world = Modelled(Spec(predictor(STABLE), least, most), hpa=hpa, hpa_wants=(least or 1) + above if hpa else 0)
    sizing, before = Sizing(keep_stable=keep), world.spec
    plans = [percent / 100 for percent in percents] + ([1.0] if ending == "promote" else [])
    for share in plans:
        beside = share if with_baseline and share < 0.5 else 0.0
        shares = {CANARY: share, STABLE: 1 - share - beside, **({BASELINE: beside} if beside else {})}
        shares = {label: part for label, part in shares.items() if part > 1e-9}
        assert ensure(world, shares, sizing)
        for trim in (False, True):
            percents_now = plan.percents(shares, STABLE)
            world.admit(plan.share_out(world.there, percents_now, sizing, trim=trim))
            carries(world)
            for _ in range(3):
                world.reconcile(a_pod_more=True)
                carries(world)
    if ending == "promote":
        pods = world.pods[CANARY]
        world.admit(plan.promote(world.there))
        for one in list(world.spec.canaries):
            world.admit(plan.retire(world.there, one.predictor.label))
        assert world.spec.stable == predictor(CANARY)
        assert world.pods[CANARY] == pods
    else:
        assert ensure(world, {STABLE: 1.0}, sizing)
        world.admit(plan.share_out(world.there, {STABLE: 100}, sizing, trim=True))
        carries(world)
        for one in list(world.spec.canaries):
            world.admit(plan.retire(world.there, one.predictor.label))
        assert world.spec.stable == predictor(STABLE)
    assert (world.spec.min_replicas, world.spec.max_replicas) == (before.min_replicas, before.max_replicas)
    for _ in range(20):
        world.reconcile(a_pod_more=True)
        carries(world)


@given(least=st.integers(1, 6), percent=st.integers(1, 100))
def test_a_canary_that_never_starts_costs_stable_nothing(least: int, percent: int) -> None:
    world = Modelled(Spec(predictor(STABLE), least), broken=frozenset({CANARY}))
    assert not ensure(world, {CANARY: percent / 100, STABLE: 1 - percent / 100}, Sizing())
    assert world.pods[STABLE] >= least
    assert world.most_of_stable <= least + 1, "one pod too many, until it is given up"
    world.admit(plan.retire(world.there, CANARY))
    assert world.spec == Spec(predictor(STABLE), least)


def test_one_pod_of_a_canary_comes_first_and_the_others_with_as_many_more_for_stable() -> None:
    there = There(Spec(predictor(STABLE), 4), {STABLE: Workload(4, 4)})
    needed = plan.needs(there, {CANARY: 0.5, STABLE: 0.5}, Sizing())
    assert needed == {CANARY: 2, STABLE: 4}
    first = plan.grow(there, VERSIONS, needed)
    assert first.canaries == (Canary(predictor(CANARY), 1, 0),)
    assert first.min_replicas == 5
    there = There(first, {STABLE: Workload(5, 5), CANARY: Workload(1, 1)}, frozenset({CANARY}), Rest(4, None, 4))
    second = plan.grow(there, VERSIONS, needed)
    assert second.canaries[0].replicas == 2
    assert second.min_replicas == 6, "KServe subtracts both, and four are left"


def test_a_stable_that_may_shrink_does_so_after_the_traffic_and_is_back_before_it() -> None:
    sizing = Sizing(keep_stable=False)
    world = Modelled(Spec(predictor(STABLE), 4))
    assert ensure(world, {CANARY: 0.5, STABLE: 0.5}, sizing)
    assert world.pods == {STABLE: 4, CANARY: 2}
    world.admit(plan.share_out(world.there, {CANARY: 50, STABLE: 50}, sizing, trim=True))
    world.reconcile(a_pod_more=False)
    assert world.pods == {STABLE: 2, CANARY: 2}
    assert plan.short_of(world.there, plan.needs(world.there, {STABLE: 1.0}, sizing)) == {STABLE: 2}
    assert ensure(world, {STABLE: 1.0}, sizing)
    assert world.pods[STABLE] == 4
    assert world.spec.percents == {CANARY: 50, STABLE: 50}, "the traffic has not moved yet"


def test_an_autoscaler_that_gave_stable_more_says_how_much_all_the_traffic_needs() -> None:
    spec = Spec(predictor(STABLE), 2, 10)
    assert plan.needs(There(spec, {STABLE: Workload(6, 6)}), {CANARY: 0.5, STABLE: 0.5}, Sizing())[CANARY] == 3
    half = replace(spec, min_replicas=4, canaries=(Canary(predictor(CANARY), 2, 50),))
    there = There(half, {STABLE: Workload(6, 6), CANARY: Workload(2, 2)}, frozenset({CANARY}), Rest(2, 10, 4))
    assert plan.needs(there, {CANARY: 1.0}, Sizing()) == {CANARY: 12}, "six for half of it"


def test_a_single_surviving_canary_pod_is_not_what_the_next_share_needs() -> None:
    spec = Spec(predictor(STABLE), 7, None, (Canary(predictor(CANARY), 3, 50),))
    there = There(spec, {STABLE: Workload(4, 4), CANARY: Workload(3, 1)}, frozenset({CANARY}), Rest(4, None, 4))
    needed = plan.needs(there, {CANARY: 0.75, STABLE: 0.25}, Sizing())
    assert plan.short_of(there, needed) == {CANARY: 2}
    assert plan.grow(there, VERSIONS, needed) == spec, "asked for already"
    assert plan.short_of(there, plan.needs(there, {STABLE: 1.0}, Sizing())) == {}, "the way back is open"


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"2": 0.05, "1": 0.95}, {"2": 5, "1": 95}),
        ({"2": 1.0}, {"2": 100, "1": 0}),
        ({"1": 1.0}, {"1": 100}),
        ({"2": 0.333, "1": 0.667}, {"2": 33, "1": 67}),
        ({"2": 0.1, "1": 0.8, "1-baseline": 0.1}, {"2": 10, "1-baseline": 10, "1": 80}),
    ],
)
def test_shares_become_whole_percents(shares: dict[str, float], expected: dict[str, int]) -> None:
    assert plan.percents(shares, "1") == expected


@pytest.mark.parametrize(
    "shares",
    [{"2": 0.005, "1": 0.995}, {"2": 0.014, "1": 0.986}, {"2": 0.5}, {"2": 1.5, "1": -0.5}, {"2": 0.999, "1": 0.001}],
)
def test_shares_that_are_no_whole_percents_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(InputError):
        plan.percents(shares, "1")


@given(canary=st.integers(1, 49), total=st.just(100))
def test_percents_sum_to_100(canary: int, total: int) -> None:
    share = canary / 100
    assert sum(plan.percents({"2": share, "1": 1 - 2 * share, "1-baseline": share}, "1").values()) == total


def test_a_version_with_a_share_is_neither_retired_nor_replaced() -> None:
    spec = Spec(predictor(STABLE), 3, None, (Canary(predictor(CANARY), 1, 30),))
    there = There(spec, {STABLE: Workload(2, 2), CANARY: Workload(1, 1)}, frozenset({CANARY}), Rest(2, None, 2))
    for refused in (lambda: plan.retire(there, CANARY), lambda: plan.promote(there)):
        with pytest.raises(TargetError, match="still has a share"):
            refused()
    assert plan.retire(there, "9") == spec


def test_traffic_without_a_predictor_is_refused() -> None:
    there = There(Spec(predictor(STABLE), 2), {STABLE: Workload(2, 2)})
    with pytest.raises(TargetError, match="ensure its capacity first"):
        plan.share_out(there, {CANARY: 20, STABLE: 80}, Sizing(), trim=False)
