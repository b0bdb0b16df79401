"""What people who send the pipeline to Kubeflow rely on, over its HTTP contract (:mod:`tests.kubeflow_stand_in`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from endcap.errors import InputError, StillRunningError, TargetError
from endcap.processes import free_port
from pipelines.compile import compile_recommender, compiled_recommender, without_caching
from pipelines.host import Host, Job, RunState, read_token, schedule, submit, wait_for_run
from pipelines.parameters import parse_assignments, typed_parameters
from pipelines.settings import PipelineSettings, load_settings
from tests.kubeflow_stand_in import Kubeflow, RedirectError, RefusalError, serving

TOKEN = "eyJhbGciOi.secret.token"
REQUIRED = {"registry": "http://mlflow:5000", "keys": "/keys"}
NIGHTLY = "0 0 4 * * *"

SETTINGS = """
apiVersion: endcap.dev/v1alpha1
kind: PipelineSettings
metadata: {name: recommender}
spec:
  image: registry.example/endcap/pipeline:0.1.0
  imagePullPolicy: IfNotPresent
  imagePullSecrets: [pull]
  nodeSelector: {pool: batch}
  resources: {train: {cpu: "4", memory: 16Gi}}
  secrets:
  - {name: endcap-signing, path: /keys, steps: [compare, package, register]}
  - {name: mlflow, env: {MLFLOW_TRACKING_TOKEN: token}}
  volumes: [{claim: training, path: /checkpoints, steps: [train]}]
  gpu:
    steps: [train]
    nodeSelector: {accelerator: l4}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  timeoutSeconds: 7200
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return compiled_recommender()


def job(compiled: dict[str, Any], name: str = "nightly", **parameters: str) -> Job:
    return Job(name, "endcap", compiled, typed_parameters(compiled, REQUIRED | parameters))


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_what_the_api_takes(compiled):
    kubeflow = Kubeflow()
    with serving(kubeflow) as url:
        first, second = (submit(Host(url), job(compiled, seed="11", training_seconds="2.5")) for _ in range(2))
    assert first != second and set(kubeflow.runs) == {first, second}
    run = kubeflow.runs[first]
    assert run["runtime_config"]["parameters"] == REQUIRED | {"seed": 11, "training_seconds": 2.5}
    assert [one["display_name"] for one in kubeflow.experiments.values()] == ["endcap"]
    assert kubeflow.experiments[run["experiment_id"]]["namespace"] == ""


def test_a_kubeflow_with_many_users_gets_the_token_and_the_namespace(compiled):
    kubeflow = Kubeflow(token=TOKEN, namespaces=("shop",))
    with serving(kubeflow) as url:
        run = submit(Host(url, token=lambda: TOKEN, namespace="shop"), job(compiled))
        with pytest.raises(TargetError, match=r"not allowed") as refused:
            submit(Host(url, token=lambda: TOKEN, namespace="other"), job(compiled))
        with pytest.raises(TargetError, match=r"token is missing, wrong or has ended") as unknown:
            submit(Host(url, token=lambda: "stale", namespace="shop"), job(compiled))
    assert "--namespace" in str(refused.value) and "KFP_TOKEN" in str(unknown.value)
    assert list(kubeflow.runs) == [run]
    assert {one["namespace"] for one in kubeflow.experiments.values()} == {"shop"}


def test_a_tokens_text_is_nowhere_to_be_seen(compiled):
    kubeflow = Kubeflow(token=TOKEN)

    def tell(method: str, path: str) -> None:
        raise RefusalError(403, 7, f"bearer {TOKEN} may not")

    kubeflow.before = tell
    with serving(kubeflow) as url:
        host = Host(url, token=lambda: TOKEN)
        with pytest.raises(TargetError) as refused:
            submit(host, job(compiled))
    assert TOKEN not in str(refused.value) and "(token)" in str(refused.value) and TOKEN not in repr(host)
    assert refused.value.__cause__ is None


def test_a_login_page_is_not_followed(compiled):
    kubeflow, elsewhere = Kubeflow(), Kubeflow()
    with serving(kubeflow) as url, serving(elsewhere) as other:

        def redirect(method: str, path: str) -> None:
            raise RedirectError(f"{other}/dex/auth?state=1")

        kubeflow.before = redirect
        with pytest.raises(TargetError, match=r"redirects to http://127.0.0.1, as a login page does"):
            submit(Host(url, token=lambda: TOKEN), job(compiled))
    assert elsewhere.seen == []


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [(503, TargetError, "answers 503"), (400, InputError, "does not take it: too much"),
     (404, TargetError, "answers 404: too much"), (409, TargetError, "answers 409")],
)  # fmt: skip
def test_what_the_host_says_is_what_a_person_reads(compiled, status, kind, said):
    kubeflow = Kubeflow()

    def refuse(method: str, path: str) -> None:
        raise RefusalError(status, 3, "too\n much")

    kubeflow.before = refuse
    with serving(kubeflow) as url, pytest.raises(kind, match=said):
        submit(Host(url), job(compiled))
    assert kubeflow.runs == {}


def test_what_is_not_kubeflow_is_named_so(compiled):
    with serving(Kubeflow()) as url, pytest.raises(TargetError, match=r"answers 404|API v2"):
        submit(Host(url + "/pipeline"), job(compiled))


def test_a_host_that_is_not_there_is_one_clear_error(compiled):
    host = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TargetError, match=host):
        submit(Host(host), job(compiled))
    with pytest.raises(TargetError, match=host):
        schedule(Host(host), job(compiled), cron=NIGHTLY)


@pytest.mark.parametrize(
    ("url", "token", "said"),
    [("kubeflow.example", None, "not a URL"), ("https://me:pw@kubeflow.example", None, "holds a password"),
     ("http://kubeflow.example", TOKEN, "plain http")],
)  # fmt: skip
def test_a_host_that_would_give_the_token_away_is_refused(url, token, said):
    with pytest.raises(InputError, match=said):
        Host(url, token=None if token is None else (lambda: token))


def test_inside_the_cluster_plain_http_is_how_it_is_spoken():
    Host("http://ml-pipeline.kubeflow.svc:8888", token=lambda: TOKEN)


def test_a_token_file_is_read_again_for_every_request(tmp_path, compiled):
    file = tmp_path / "token"
    file.write_text("first\n")
    kubeflow = Kubeflow(token="first", namespaces=("shop",))
    with serving(kubeflow) as url:
        host = Host(url, token=lambda: read_token(file), namespace="shop")
        run = submit(host, job(compiled))
        file.write_text("second")
        kubeflow.token = "second"
        kubeflow.runs[run]["state"] = "SUCCEEDED"
        assert wait_for_run(host, run, timeout_s=1).state == "SUCCEEDED"
    for wrong in ("", "two lines\nhere", "x" * 70_000):
        file.write_text(wrong)
        with pytest.raises(InputError, match="not a token"):
            read_token(file)
    with pytest.raises(InputError, match="no token to read"):
        read_token(tmp_path / "none")


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_scheduled_twice_it_is_scheduled_once(compiled):
    kubeflow = Kubeflow()
    with serving(kubeflow) as url:
        first = schedule(Host(url), job(compiled), cron=NIGHTLY)
        second = schedule(Host(url), job(compiled), cron="0  0 4 * * *")
    assert (first.created, second.created) == (True, False) and first.id == second.id
    made = kubeflow.recurring[first.id]
    assert made["max_concurrency"] == "1" and made["no_catchup"] is True and made["mode"] == "ENABLE"
    assert list(kubeflow.recurring) == [first.id]


@pytest.mark.parametrize("change", ["cron", "parameters", "pipeline"])
def test_a_schedule_that_says_something_else_takes_the_place_of_the_old_one(compiled, change):
    kubeflow = Kubeflow()
    with serving(kubeflow) as url:
        old = schedule(Host(url), job(compiled), cron=NIGHTLY)
        before = len(kubeflow.seen)
        other = job(compiled, seed="8") if change == "parameters" else job(compiled)
        if change == "pipeline":
            other = job(without_caching(compiled))
        new = schedule(Host(url), other, cron="0 0 5 * * *" if change == "cron" else NIGHTLY)
    assert new.replaced == (old.id,) and list(kubeflow.recurring) == [new.id]
    sent = [one for one in kubeflow.seen[before:] if "recurringruns" in one and not one.startswith("GET")]
    assert [one.split()[0] for one in sent] == ["POST", "DELETE"], "the new one stands before the old one goes"


def test_after_a_crash_between_the_two_the_next_one_puts_it_right(compiled):
    kubeflow = Kubeflow()

    def crash(method: str, path: str) -> None:
        if method == "DELETE":
            raise RefusalError(503, 14, "down")

    with serving(kubeflow) as url:
        for hour in (1, 2, 3):
            schedule(Host(url), job(compiled), cron=f"0 0 {hour} * * *")
        kubeflow.before = crash
        with pytest.raises(TargetError, match="503"):
            schedule(Host(url), job(compiled), cron=NIGHTLY)
        assert len(kubeflow.recurring) == 2
        kubeflow.before = lambda method, path: None
        made = schedule(Host(url), job(compiled), cron=NIGHTLY)
    assert not made.created and list(kubeflow.recurring) == [made.id]


def test_two_who_schedule_at_once_come_to_one(compiled):
    kubeflow = Kubeflow()
    inside = False

    def meanwhile(method: str, path: str) -> None:
        nonlocal inside
        if method == "POST" and path.endswith("recurringruns") and not inside:
            inside = True
            schedule(Host(url), job(compiled), cron=NIGHTLY)

    kubeflow.before = meanwhile
    with serving(kubeflow) as url:
        schedule(Host(url), job(compiled), cron=NIGHTLY)
    assert inside and len(kubeflow.recurring) == 1


def test_a_disabled_schedule_stays_disabled_and_a_foreign_one_is_left_alone(compiled):
    kubeflow = Kubeflow()
    with serving(kubeflow) as url:
        made = schedule(Host(url), job(compiled), cron=NIGHTLY)
        kubeflow.recurring[made.id].update(mode="DISABLE", status="DISABLED")
        again = schedule(Host(url), job(compiled), cron=NIGHTLY)
        assert (again.id, again.created, again.enabled) == (made.id, False, False)
        kubeflow.recurring[made.id]["description"] = "made by hand"
        with pytest.raises(InputError, match="endcap did not make"):
            schedule(Host(url), job(compiled), cron=NIGHTLY)
        assert list(kubeflow.recurring) == [made.id]
        with pytest.raises(InputError, match="six fields"):
            schedule(Host(url), job(compiled, name="other"), cron="0 4 * * *")
        with pytest.raises(InputError, match="cron"):
            schedule(Host(url), job(compiled, name="other"), cron="0 0 4 ! * *")


# ---- waiting ---------------------------------------------------------------------------------------------------------


class Time:
    def __init__(self, then: dict[int, Any]) -> None:
        self.now, self.then, self.naps = 0.0, then, 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1
        if self.naps in self.then:
            self.then[self.naps]()


def details(*tasks: tuple[str, str]) -> dict[str, Any]:
    return {"task_details": [{"display_name": name, "state": state} for name, state in tasks]}


@pytest.mark.parametrize(
    ("state", "tasks", "registered", "failed"),
    [("SUCCEEDED", [("compare-champion", "SUCCEEDED"), ("register-candidate", "SUCCEEDED")], True, ()),
     ("SUCCEEDED", [("compare-champion", "SUCCEEDED"), ("register-candidate", "SKIPPED")], False, ()),
     ("SUCCEEDED", [("compare-champion", "SUCCEEDED")], False, ()),
     ("SUCCEEDED", [], None, ()),
     ("FAILED", [("compare-champion", "SUCCEEDED"), ("train-candidates", "FAILED")], False, ("train-candidates",)),
     ("CANCELED", [], None, ())],
)  # fmt: skip
def test_waiting_ends_with_what_became_of_the_run(compiled, state, tasks, registered, failed):
    kubeflow = Kubeflow()
    seen: list[str] = []
    with serving(kubeflow) as url:
        run = submit(Host(url), job(compiled))

        def end() -> None:
            kubeflow.runs[run].update(state=state, run_details=details(*tasks), error={"code": 1, "message": "why"})

        def away() -> None:
            def refuse(method: str, path: str) -> None:
                raise RefusalError(503, 14, "restarting")

            kubeflow.before = refuse

        def back() -> None:
            kubeflow.before = lambda method, path: None

        time = Time({1: lambda: kubeflow.runs[run].update(state="RUNNING"), 2: away, 4: back, 5: end})
        found = wait_for_run(Host(url), run, timeout_s=100, clock=time.clock, sleep=time.sleep,
                             on_state=lambda one: seen.append(one.state))  # fmt: skip
    assert found == RunState(run, state, registered, failed, "why")
    assert seen == ["PENDING", "RUNNING", "RUNNING", state]


def test_the_time_to_wait_ends_and_the_run_goes_on(compiled):
    kubeflow = Kubeflow()
    with serving(kubeflow) as url:
        run = submit(Host(url), job(compiled))
        time = Time({})
        with pytest.raises(StillRunningError, match=r"has not ended within 25 s \(last seen PENDING\)"):
            wait_for_run(Host(url), run, timeout_s=25, clock=time.clock, sleep=time.sleep)
        assert time.now == 25
        with pytest.raises(TargetError, match="not found"):
            wait_for_run(Host(url), "none", timeout_s=25, clock=time.clock, sleep=time.sleep)
    assert StillRunningError.exit_code == 5


# ---- parameters, caching, settings -----------------------------------------------------------------------------------


def test_parameters_are_checked_before_anything_is_sent(compiled):
    assert parse_assignments(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for wrong, said in ((["a"], "not a parameter"), (["a=1", "a=2"], "twice")):
        with pytest.raises(InputError, match=said):
            parse_assignments(wrong)
    for given, said in (
        ({"sead": "7"}, "no parameter 'sead'"), ({"seed": "7.5"}, "not a whole number"),
        ({"training_seconds": "nan"}, "not a number"), ({"training_seconds": "soon"}, "not a number"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            typed_parameters(compiled, REQUIRED | given)
    with pytest.raises(InputError, match="needs 'keys'"):
        typed_parameters(compiled, {"registry": "x"})


def caching(compiled: dict[str, Any]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    spec = compiled.get("pipeline_spec", compiled)
    for dag in (spec["root"], *spec["components"].values()):
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            if "cachingOptions" in task:
                found[name] = bool(task["cachingOptions"].get("enableCache"))
    return found


def test_without_caching_nothing_is_taken_over_and_with_it_never_what_looks_at_the_registry(compiled):
    before = caching(compiled)
    assert before["train-candidates"] and before["package-candidate"]
    assert not before["compare-champion"] and not before["register-candidate"]
    after = caching(without_caching(compiled))
    assert set(after) == set(before) and not any(after.values())
    assert caching(compiled) == before


def test_settings_reach_the_steps_and_only_those(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(SETTINGS)
    settings = load_settings(file)
    made = compiled_recommender(settings)
    executors = made["pipeline_spec"]["deploymentSpec"]["executors"]
    assert {one["container"]["image"] for one in executors.values()} == {"registry.example/endcap/pipeline:0.1.0"}
    asked = executors["exec-train-candidates"]["container"]["resources"]
    assert asked["accelerator"]["resourceType"] == "nvidia.com/gpu" and asked["accelerator"]["resourceCount"] == "1"
    assert all("accelerator" not in one["container"].get("resources", {})
               for name, one in executors.items() if name != "exec-train-candidates")  # fmt: skip
    placed = made["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(placed) == set(executors)
    train = placed["exec-train-candidates"]
    assert train["nodeSelector"]["labels"] == {"pool": "batch", "accelerator": "l4"}
    assert [one["key"] for one in train["tolerations"]] == ["nvidia.com/gpu"]
    assert [one["mountPath"] for one in train["pvcMount"]] == ["/checkpoints"]
    with_keys = {name for name, one in placed.items() if "secretAsVolume" in one}
    assert with_keys == {"exec-compare-champion", "exec-package-candidate", "exec-register-candidate"}
    for one in placed.values():
        assert one["secretAsEnv"][0]["keyToEnv"] == [{"envVar": "MLFLOW_TRACKING_TOKEN", "secretKey": "token"}]
        assert one["securityContext"] == {"runAsNonRoot": True} and one["imagePullSecret"][0]["secretName"] == "pull"
    kubeflow = Kubeflow()
    with serving(kubeflow) as url:
        submit(Host(url), job(made))  # held against the protobuf messages


def test_compiled_without_settings_it_is_one_document_and_the_same_as_ever(tmp_path):
    compile_recommender(tmp_path / "one.yaml")
    assert len(list(yaml.safe_load_all((tmp_path / "one.yaml").read_text()))) == 1
    compile_recommender(tmp_path / "two.yaml", PipelineSettings())
    assert len(list(yaml.safe_load_all((tmp_path / "two.yaml").read_text()))) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("steps: [train]", "steps: [trian]", r"spec.volumes.0.steps.0"), ("path: /keys", "path: keys", r"secrets.0.path"),
     ("env: {MLFLOW_TRACKING_TOKEN: token}", "env: {}", "one of path and env"), ("cpu: \"4\"", "cpu: four", "cpu"),
     ("path: /checkpoints, steps: [train]", "path: /keys", "two mounts"), ("image:", "imagee:", "unknown field")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path, old, new, said):
    file = tmp_path / "settings.yaml"
    assert old in SETTINGS
    file.write_text(SETTINGS.replace(old, new, 1))
    with pytest.raises(InputError, match=said):
        load_settings(file)


# ---- the command -----------------------------------------------------------------------------------------------------


def endcap(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "endcap.cli", *arguments], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment}, timeout=300,
    )  # fmt: skip


def test_the_command_submits_waits_and_says_how_it_ended(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    kubeflow = Kubeflow(token=TOKEN, namespaces=("shop",))

    def end(method: str, path: str) -> None:
        for run in kubeflow.runs.values():
            run.update(state="SUCCEEDED", run_details=details(("compare-champion", "SUCCEEDED")))

    kubeflow.before = end
    with serving(kubeflow) as url:
        given = ("--registry", "http://mlflow:5000", "--json")
        common = {"KFP_HOST": url, "KFP_NAMESPACE": "shop"}
        waited = endcap("pipeline", "submit", *given, "--wait", "--timeout-s", "60", "-p", "seed=8", "--no-caching",
                        "--token-file", str(token), **common)  # fmt: skip
        made = endcap("pipeline", "schedule", *given, "--cron", NIGHTLY, KFP_TOKEN=TOKEN, **common)
        unknown = endcap("pipeline", "submit", *given, "-p", "sead=8", KFP_TOKEN=TOKEN, **common)
    assert waited.returncode == 4, waited.stderr
    assert json.loads(waited.stdout)["registered"] is False and "gate did not let" in waited.stderr
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {"recurring_run": next(iter(kubeflow.recurring)), "created": True,
                                       "enabled": True, "replaced": []}  # fmt: skip
    assert unknown.returncode == 2 and "no parameter 'sead'" in unknown.stderr
    assert len(kubeflow.runs) == 1 and TOKEN not in waited.stderr + waited.stdout
