"""A rollout as an object of a cluster: driven to its end, steered, deleted, edited, refused, cut off at any write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from endcap.errors import TargetError
from serving.operator.checkpoint import checkpoint_name
from serving.operator.objects import FINALIZER, Key, config_map_path, objectives_path, rollout_path
from serving.rollout.events import Gated
from serving.targets.kserve.errors import Reason, ServiceError
from tests.operator_world import KEY, Cut, MemoryApi, Shop, drive_to_end, rollout
from tests.simulated import Killed

CHECKPOINT = config_map_path(KEY.namespace, checkpoint_name(KEY.name))


@pytest.fixture
def api() -> MemoryApi:
    return MemoryApi()


@pytest.fixture
def shop(api: MemoryApi) -> Shop:
    shop = Shop(api)
    shop.apply()
    return shop


def test_a_better_version_is_promoted_and_the_object_says_so(api: MemoryApi, shop: Shop) -> None:
    status = drive_to_end(shop, shop.drive())
    assert (status["outcome"], status["phase"], status["step"], status["share"]) == ("promoted", "done", "3/3", "100%")
    assert (shop.target.shares, shop.target.capacity) == ({"2": 1.0}, {"2"})
    assert status["message"] == "version 2 was promoted: all traffic is its own"
    conditions = api.conditions()
    assert {name: found[0] for name, found in conditions.items()} == {
        "Accepted": "True", "Progressing": "False", "Promoted": "True", "UpToDate": "True",
    }  # fmt: skip
    assert [line["action"] for line in status["history"]][-2:] == ["retiring", "end"]
    assert {one["name"] for one in status["objectives"]} == {"availability", "click-through"}
    assert FINALIZER not in api.objects[rollout_path(*KEY)]["metadata"]["finalizers"], "it may go at once"


def test_every_decision_is_one_event_with_a_reason(api: MemoryApi, shop: Shop) -> None:
    status = drive_to_end(shop, shop.drive())
    events = api.events()
    assert len(events) == len(status["history"])
    assert [one["reason"] for one in events] == [
        "Begun", "Growing", "Observing", "Growing", "Observing", "Growing", "Observing", "Retiring", "Ended",
    ]  # fmt: skip
    assert all(one["involvedObject"]["name"] == KEY.name for one in events)


def test_a_worse_version_is_rolled_back_with_a_warning(api: MemoryApi) -> None:
    shop = Shop(api, clicked=0.02)
    shop.apply()
    status = drive_to_end(shop, shop.drive())
    assert (status["outcome"], status["share"]) == ("rolled_back", "0%")
    assert shop.target.shares == {"1": 1.0}
    assert api.conditions()["Promoted"][:2] == ("False", "RolledBack")
    assert "click-through" in api.conditions()["Promoted"][2]
    assert [one["type"] for one in api.events() if one["reason"] in ("Returning", "Ended")] == ["Warning", "Warning"]


def test_what_is_kept_of_a_look_is_small_and_the_look_is_one_write(api: MemoryApi, shop: Shop) -> None:
    drive = shop.drive()
    for _ in shop.turns(drive):
        if shop.status.get("phase") == "observing" and not drive.may_take_long:
            break
    api.calls.clear()
    shop.clock.wait(1)
    drive.turn()
    writes = [call for call in api.calls if call[0] != "GET"]
    assert writes == [("PUT", CHECKPOINT)]
    kept = api.objects[CHECKPOINT]
    assert sum(len(text) for text in (*kept["data"].values(), *kept["binaryData"].values())) < 12_000


# ---- killed anywhere ----


@pytest.mark.parametrize(("clicked", "expected"), [(0.1, "promoted"), (0.02, "rolled_back")])
def test_killed_at_any_write_it_goes_on_to_the_same_end(clicked: float, expected: str) -> None:
    def world() -> Shop:
        shop = Shop(MemoryApi(), clicked=clicked)
        shop.apply()
        return shop

    whole = world()
    counted = Cut(whole.api, None)
    assert drive_to_end(whole, whole.drive(counted))["outcome"] == expected
    assert counted.points > 40
    for point in range(1, counted.points + 1):
        shop = world()
        with pytest.raises(Killed):
            drive_to_end(shop, shop.drive(Cut(shop.api, point)))
        status = drive_to_end(shop, shop.drive(fence=2))
        assert status["outcome"] == expected, point
        served = "2" if expected == "promoted" else "1"
        assert (shop.target.shares, shop.target.capacity) == ({served: 1.0}, {served}), point
        assert [line["seq"] for line in status["history"]] == list(range(1, len(status["history"]) + 1)), point
        assert isinstance(shop.api, MemoryApi)
        assert len(shop.api.events()) >= len(status["history"]) - 1, "told by whoever took it over, or by both once"
        assert not shop.api.objects[rollout_path(*KEY)]["metadata"]["finalizers"], point


def test_killed_at_any_call_of_the_target_it_goes_on_to_the_same_end() -> None:
    def world() -> Shop:
        shop = Shop(MemoryApi())
        shop.apply()
        return shop

    whole = world()
    assert drive_to_end(whole, whole.drive())["outcome"] == "promoted"
    assert whole.target.calls > 15
    for call in range(1, whole.target.calls + 1):
        for when in ("before", "after"):
            shop = world()
            shop.target.die_at = (call, when)
            with pytest.raises(Killed):
                drive_to_end(shop, shop.drive())
            shop.target.die_at = None
            assert drive_to_end(shop, shop.drive(fence=2))["outcome"] == "promoted", (call, when)
            assert (shop.target.shares, shop.target.capacity) == ({"2": 1.0}, {"2"}), (call, when)


def test_one_that_was_overtaken_decides_nothing_more(shop: Shop) -> None:
    first, second = shop.drive(fence=1), shop.drive(fence=2)
    turns = shop.turns(first)
    for _ in range(6):
        next(turns)
    second.turn()
    before = list(shop.target.log)
    shop.clock.wait(5)
    for _ in range(4):
        first.turn()
        shop.clock.wait(40)
    assert shop.target.log == before
    assert not first.is_under_way
    assert drive_to_end(shop, second)["outcome"] == "promoted"


def test_an_answer_that_was_lost_is_no_other_writer(api: MemoryApi, shop: Shop) -> None:
    drive, lost = shop.drive(), iter([False, False, True] * 50)
    real = api.replace

    def replace(path: str, body: dict[str, Any]) -> dict[str, Any]:
        found = real(path, body)
        if next(lost, False):
            raise TargetError("the API server does not answer: ReadTimeoutError")
        return found

    api.replace = replace  # type: ignore[method-assign]
    assert drive_to_end(shop, drive)["outcome"] == "promoted"


def test_an_api_server_that_is_away_for_a_while_costs_looks_and_no_verdict(api: MemoryApi, shop: Shop) -> None:
    def away() -> None:
        api.away = True

    def back() -> None:
        api.away = False

    class Deaf(Shop):
        def object_of(self, key: Key) -> Any:
            found = api.objects.get(rollout_path(*key))
            from serving.operator.objects import RolloutObject

            return None if found is None else RolloutObject.of(found)

    deaf = Deaf(api)
    drive, ends_s = deaf.drive(), deaf.clock.now_s()
    for _ in deaf.turns(drive):
        passed_s = deaf.clock.now_s() - ends_s
        (away if 3 <= passed_s < 90 else back)()
    back()
    assert deaf.status["outcome"] == "promoted"


# ---- people ----


def test_what_people_ask_is_heard_once_and_taken_off_the_object(api: MemoryApi, shop: Shop) -> None:
    status = drive_to_end(
        shop, shop.drive(),
        at={1: lambda: api.annotate(KEY, pause="ann"), 100: lambda: api.annotate(KEY, resume="bob")},
    )  # fmt: skip
    assert status["outcome"] == "promoted"
    assert [(line["action"], line["by"]) for line in status["history"] if "by" in line] == [
        ("pause", "ann"), ("resume", "bob"),
    ]  # fmt: skip
    assert shop.clock.now_s() > 1_100
    assert not api.objects[rollout_path(*KEY)]["metadata"]["annotations"]


def test_a_paused_rollout_says_what_to_do(api: MemoryApi, shop: Shop) -> None:
    api.annotate(KEY, pause="ann")
    drive = shop.drive()
    turns = shop.turns(drive)
    for _ in range(12):
        next(turns)
    assert api.conditions()["Progressing"][:2] == ("False", "Paused")
    assert "resume=YOU" in shop.status["next"]
    api.annotate(KEY, abort="ann at 12:00")
    assert drive_to_end(shop, drive)["outcome"] == "aborted"
    assert shop.status["reason"] == "aborted by ann"


@pytest.mark.parametrize("asked", ["ann", "step 2 ann at noon", "2"])
def test_a_step_that_waits_is_approved_by_name_or_by_number(asked: str, api: MemoryApi) -> None:
    shop = Shop(api)
    first, second, last = rollout()["spec"]["steps"]
    shop.apply(steps=[first, {**second, "approval": True}, last])
    drive = shop.drive()
    for _ in shop.turns(drive):
        if shop.clock.now_s() > 1_050:
            break
    assert "step 2 (50%) waits for approval" in api.conditions()["Progressing"][2]
    assert "approve='step 2 YOU'" in shop.status["next"]
    api.annotate(KEY, approve=asked)
    assert drive_to_end(shop, drive)["outcome"] == "promoted"


def test_a_deletion_returns_the_traffic_before_the_object_goes(api: MemoryApi, shop: Shop) -> None:
    drive = shop.drive()
    for _ in shop.turns(drive):
        if shop.target.shares.get("2"):
            break
    api.delete(rollout_path(*KEY))
    assert rollout_path(*KEY) in api.objects
    for _ in shop.turns(drive):
        pass
    assert (shop.target.shares, shop.target.capacity) == ({"1": 1.0}, {"1"})
    assert rollout_path(*KEY) not in api.objects
    assert CHECKPOINT not in api.objects, "what it owned went with it"


def test_a_deletion_while_no_operator_runs_is_heard_by_the_next_one(api: MemoryApi, shop: Shop) -> None:
    for _ in shop.turns(shop.drive()):
        if shop.target.shares.get("2"):
            break
    api.delete(rollout_path(*KEY))
    for _ in shop.turns(shop.drive(fence=2)):
        pass
    assert shop.target.shares == {"1": 1.0}
    assert rollout_path(*KEY) not in api.objects


def test_another_candidate_begins_when_the_one_before_has_ended(api: MemoryApi, shop: Shop) -> None:
    drive = shop.drive()
    turns = shop.turns(drive)
    for _ in range(8):
        next(turns)
    api.merge(rollout_path(*KEY), {"spec": {"candidate": "models:/recommender/3"}})
    for _ in range(6):
        next(turns)
    assert api.conditions()["UpToDate"][:2] == ("False", "SpecChanged")
    assert "candidate" in api.conditions()["UpToDate"][2]
    assert shop.status["canary"] == "2"
    status = drive_to_end(shop, drive)
    assert (status["canary"], status["outcome"], status["stable"]) == ("3", "promoted", "2")
    assert api.conditions()["UpToDate"][0] == "True"
    assert [line["seq"] for line in status["history"]] == list(range(1, len(status["history"]) + 1))


def test_other_rules_in_the_middle_change_nothing_and_are_told(api: MemoryApi, shop: Shop) -> None:
    drive = shop.drive()
    turns = shop.turns(drive)
    for _ in range(6):
        next(turns)
    api.merge(rollout_path(*KEY), {"spec": {"alpha": 0.3}})
    assert drive_to_end(shop, drive)["outcome"] == "promoted"
    assert api.conditions()["UpToDate"][:2] == ("False", "SpecChanged")
    assert "alpha" in api.conditions()["UpToDate"][2]


def test_a_freeze_declared_in_the_middle_is_kept(api: MemoryApi, shop: Shop) -> None:
    drive = shop.drive()
    turns = shop.turns(drive)
    for _ in range(4):
        next(turns)
    freeze = [{"from": "1970-01-01T00:00:00Z", "until": "1970-01-01T00:30:00Z", "reason": "the sales"}]
    api.merge(rollout_path(*KEY), {"spec": {"freeze": freeze}})
    for _ in range(8):
        next(turns)
    assert "the sales" in api.conditions()["Progressing"][2]
    assert api.conditions()["UpToDate"][0] == "True"
    assert drive_to_end(shop, drive)["outcome"] == "promoted"
    assert shop.clock.now_s() >= 1_800


# ---- bad input: a condition and an event that say what to do, and nothing changed ----


def refused(api: MemoryApi, shop: Shop, reason: str, because: str) -> None:
    drive = shop.drive()
    assert drive.turn() is not None, "it is looked at again"
    status, found, message = api.conditions()["Accepted"]
    assert (status, found) == ("False", reason)
    assert because in message
    assert "next: " in message
    assert (found, message) in [(one["reason"], one["message"]) for one in api.events()]
    assert (shop.target.shares, shop.target.capacity, shop.target.log) == ({"1": 1.0}, {"1"}, [])
    assert CHECKPOINT not in api.objects
    assert not api.objects[rollout_path(*KEY)]["metadata"].get("finalizers")
    told = len(api.events())
    shop.clock.wait(100)
    drive.turn()
    assert len(api.events()) == told, "told once"


@pytest.mark.parametrize(
    ("reason", "because"),
    [
        (Reason.NOT_FOUND, "no InferenceService"), (Reason.NOT_STANDARD, "not in Standard mode"),
        (Reason.NO_MODEL, "no model"), (Reason.NO_GATEWAY_API, "no Gateway API"),
        (Reason.GATEWAY_API_OFF, "made it no HTTPRoute"), (Reason.NO_SPLIT, "still sends all"),
    ],
)  # fmt: skip
def test_a_service_that_cannot_be_rolled_out_on_is_refused_with_its_reason(
    reason: Reason, because: str, api: MemoryApi, shop: Shop
) -> None:
    shop.refuse = ServiceError(reason, because, next_step="mend it")
    refused(api, shop, reason, because)


@pytest.mark.parametrize(
    ("spec", "because"),
    [
        ({"candidate": "recommender"}, "names no model version"), ({"objectives": "none"}, "no Objectives 'none'"),
        ({"steps": [{"share": 1}]}, "a share below 1"), ({"primary": "click-through"}, "mode: ab"),
        ({"margins": {"clicks": {"relative": 0.1}}}, "no objective is called 'clicks'"), ({"alpha": "x"}, "alpha"),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be_followed_is_refused(spec: dict[str, Any], because: str, api: MemoryApi) -> None:
    shop = Shop(api)
    shop.apply(**spec)
    refused(api, shop, "InvalidSpec", because)


def test_what_was_lacking_and_came_lets_it_begin(api: MemoryApi, shop: Shop) -> None:
    path = objectives_path(KEY.namespace, "recommender")
    held = api.objects.pop(path)
    drive = shop.drive()
    drive.turn()
    assert api.conditions()["Accepted"][0] == "False"
    api.objects[path] = held
    assert drive_to_end(shop, drive)["outcome"] == "promoted"
    assert api.conditions()["Accepted"][0] == "True"


def test_two_rollouts_of_one_service_do_not_run_at_once(api: MemoryApi, shop: Shop) -> None:
    other = Key(KEY.namespace, "another")
    api.create(rollout_path(KEY.namespace), rollout(other, candidate="models:/recommender/3"))
    first, second = shop.drive(), shop.drive(key=other)
    for _ in range(4):
        first.turn()
        second.turn()
    status, reason, message = api.conditions(other)["Accepted"]
    assert (status, reason) == ("False", "ServiceBusy")
    assert "recommender is under way" in message
    assert not api.objects[rollout_path(*other)]["metadata"].get("finalizers")
    drive_to_end(shop, first)
    for _ in shop.turns(second):
        pass
    assert shop.target.shares == {"3": 1.0}


def test_a_version_that_its_checks_refuse_is_refused(api: MemoryApi, shop: Shop) -> None:
    shop.gates = lambda _candidate, _stable: Gated(False, "offline: worse by 12 %")
    status = drive_to_end(shop, shop.drive())
    assert (status["outcome"], status["reason"]) == ("refused", "refused before any traffic: offline: worse by 12 %")


def damaged(change: Callable[[dict[str, Any]], None]) -> None:
    api = MemoryApi()
    shop = Shop(api)
    shop.apply()
    turns = shop.turns(shop.drive())
    for _ in range(8):
        next(turns)
    change(api.objects[CHECKPOINT])
    shares, drive = dict(shop.target.shares), shop.drive(fence=2)
    assert drive.turn() is not None
    assert shop.target.shares == shares
    assert api.conditions()["Progressing"][1] == "Damaged"
    assert "configmap" in api.conditions()["Progressing"][2]


def test_a_damaged_checkpoint_is_told_and_nothing_is_done() -> None:
    damaged(lambda found: found["data"].update({"state.json": "{"}))
    damaged(lambda found: found["data"].pop("sight.json"))
    damaged(lambda found: found["binaryData"].update({"declared.json.z": "AAAA"}))
    damaged(lambda found: found["metadata"].update(ownerReferences=[]))
    damaged(lambda found: found["data"].update(format="7"))


def test_a_service_that_went_away_holds_no_deletion_up(api: MemoryApi, shop: Shop) -> None:
    for _ in shop.turns(shop.drive()):
        if shop.target.shares.get("2"):
            break
    shop.refuse = ServiceError(Reason.NOT_FOUND, "no InferenceService recommender", next_step="make it again")
    api.delete(rollout_path(*KEY))
    shop.drive(fence=2).turn()
    assert rollout_path(*KEY) not in api.objects


def test_an_input_error_of_the_target_s_is_a_refusal_and_not_a_fault(api: MemoryApi, shop: Shop) -> None:
    shop.target.shares = {"1": 0.5, "3": 0.5}
    drive = shop.drive()
    assert drive.turn() is not None
    assert "traffic is split over versions 1, 3" in api.conditions()["Accepted"][2]
    assert shop.target.shares == {"1": 0.5, "3": 0.5}
