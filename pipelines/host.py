"""Kubeflow Pipelines' API (v2beta1), as far as endcap needs it: one run, a recurring run, and how a run came out.

Spoken through ``kfp_server_api``, the client generated from the API's own swagger, not through ``kfp.Client``: that
one prints to standard output, reads settings of the user's home and follows a redirect to a login page with the token.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from endcap.errors import EndcapError, InputError, StillRunningError, TargetError

__all__ = [
    "Host", "Job", "RunState", "Scheduled", "outcome_of", "read_token", "schedule", "submit", "wait_for_run",
]  # fmt: skip

_MARK = "endcap sha256:"
_PAGE = 100
_MAX_TOKEN_BYTES = 64 << 10
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CRON_FIELDS = 6


def read_token(path: Path) -> str:
    """A bearer token out of a file, such as a projected ServiceAccount token.

    Raises:
        InputError: missing, empty, too large, or not one line of visible ASCII.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise InputError(f"no token to read ({error.strerror})", where=path) from error
    text = raw.decode("ascii", "replace").strip()
    if not text or len(raw) > _MAX_TOKEN_BYTES or not all("!" <= letter <= "~" for letter in text):
        raise InputError("not a token: one line of visible characters is needed", where=path)
    return text


@dataclass(frozen=True, slots=True)
class Host:
    """Where Kubeflow Pipelines answers.

    Attributes:
        url: of the API; with a path where it stands behind one (``https://kubeflow.example/pipeline``).
        token: gives the bearer token, asked before every request, because mounted tokens are renewed; None: no token.
        namespace: the profile's namespace of a Kubeflow with many users; None on one without.
        ca: PEM file of the authority that signed the host's certificate; None: the public ones.
        request_timeout_s: of one request.
    """

    url: str
    token: Callable[[], str] | None = field(default=None, repr=False)
    namespace: str | None = None
    ca: Path | None = None
    request_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"not a URL of a host: {self.url!r}", where="--host",
                             next_step="write https://HOST, with a path if it stands behind one")  # fmt: skip
        if parts.username or parts.password:
            raise InputError("the URL holds a password", where="--host", next_step="give a token in KFP_TOKEN")
        inside = parts.hostname in _LOOPBACK or parts.hostname.endswith((".svc", ".svc.cluster.local"))
        if self.token is not None and parts.scheme == "http" and not inside:
            raise InputError("a token is not sent over plain http", where=self.url, next_step="use https://")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run: the compiled pipeline with its parameters, in an experiment, under a name."""

    name: str
    experiment: str
    compiled: Mapping[str, Any]
    parameters: Mapping[str, str | int | float | bool]
    service_account: str | None = None
    pipeline_root: str | None = None


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A recurring run as it stands now. ``replaced``: the ids of those that were ours and said something else."""

    id: str
    created: bool
    enabled: bool
    replaced: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunState:
    """How a run stands: Kubeflow's state, the ended steps' names, and the run's error where there is one.

    ``registered``: whether the step that registers succeeded; None: the host does not tell of steps.
    """

    id: str
    state: str
    registered: bool | None = None
    failed_steps: tuple[str, ...] = ()
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


def submit(host: Host, job: Job) -> str:
    """Run the pipeline once; returns the run's id. Sent once: a request whose answer was lost is not sent again.

    Raises:
        TargetError: the host does not answer, or refuses. InputError: it finds fault with what was sent.
    """
    import kfp_server_api as api

    with _client(host) as client:
        run = api.V2beta1Run(
            display_name=job.name, experiment_id=_experiment(api, client, host, job.experiment),
            pipeline_spec=dict(job.compiled), service_account=job.service_account,
            runtime_config=_runtime(api, job),
        )  # fmt: skip
        made = api.RunServiceApi(client).run_service_create_run(run=run, _request_timeout=host.request_timeout_s)
        return _known(made, "run_id", host)


def schedule(host: Host, job: Job, *, cron: str) -> Scheduled:
    """See to it that there is one recurring run of this name in the experiment, and that it is this one.

    Said twice it is there once. One of ours that says something else is replaced: the new one is made before the old
    one goes. One that somebody else made is left alone. One that was disabled stays so.

    Raises:
        TargetError: the host does not answer, or refuses. InputError: the name is taken, or ``cron`` is none.
    """
    import kfp_server_api as api

    if len(cron.split()) != _CRON_FIELDS:
        raise InputError(f"not six fields: {cron!r}", where="--cron",
                         next_step="seconds come first: '0 0 4 * * *' is 4 each night")  # fmt: skip
    with _client(host) as client:
        service = api.RecurringRunServiceApi(client)
        experiment = _experiment(api, client, host, job.experiment)
        mark = _MARK + _digest(job, cron)
        found = _recurring(service, host, experiment, job.name)
        foreign = [one for one in found if not str(one.description or "").startswith(_MARK)]
        if foreign:
            raise InputError(f"a schedule named {job.name!r} is there that endcap did not make", where=host.url,
                             next_step="give this one another --schedule-name, or delete that one")  # fmt: skip
        created = all(one.description != mark for one in found)
        if created:
            made = service.recurring_run_service_create_recurring_run(
                recurring_run=api.V2beta1RecurringRun(
                    display_name=job.name, description=mark, experiment_id=experiment,
                    pipeline_spec=dict(job.compiled), service_account=job.service_account,
                    runtime_config=_runtime(api, job), max_concurrency="1", no_catchup=True, mode="ENABLE",
                    trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
                ),
                _request_timeout=host.request_timeout_s,
            )  # fmt: skip
            _known(made, "recurring_run_id", host)
            # Another that did the same at the same moment is seen here, and both come to the same one.
            found = _recurring(service, host, experiment, job.name)
        same = sorted((one for one in found if one.description == mark), key=_age)
        if not same:
            raise TargetError("the schedule was made and is not there", where=host.url, next_step="run it again")
        gone = [one for one in found if one is not same[0] and str(one.description or "").startswith(_MARK)]
        for one in gone:
            service.recurring_run_service_delete_recurring_run(one.recurring_run_id,
                                                               _request_timeout=host.request_timeout_s)  # fmt: skip
        return Scheduled(
            id=_known(same[0], "recurring_run_id", host), created=created,
            enabled=str(same[0].mode or same[0].status or "ENABLE").startswith("ENABLE"),
            replaced=tuple(str(one.recurring_run_id) for one in gone if one.description != mark),
        )  # fmt: skip


def wait_for_run(
    host: Host, run_id: str, *, timeout_s: float, poll_s: float = 10.0,
    on_state: Callable[[RunState], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
) -> RunState:  # fmt: skip
    """Ask until the run has ended. A host that is away for a while is asked again, as long as there is time.

    Raises:
        StillRunningError: ``timeout_s`` is over; the run goes on.
        TargetError: the host refuses (the token, the namespace, an unknown run).
    """
    import kfp_server_api as api

    deadline_s = clock() + timeout_s
    state = RunState(run_id, "unknown")
    away: EndcapError | None = None
    while True:
        try:
            with _client(host) as client:
                state = outcome_of(
                    api.RunServiceApi(client).run_service_get_run(run_id, _request_timeout=host.request_timeout_s), host
                )
            away = None
            on_state(state)
        except _AwayError as error:
            away = error
        if state.ended:
            return state
        left_s = deadline_s - clock()
        if left_s <= 0:
            said = f"last seen {state.state}" if away is None else f"last seen {state.state}; now {away.what}"
            raise StillRunningError(f"run {run_id} has not ended within {timeout_s:g} s ({said})", where=host.url,
                                    next_step=f"it goes on; look again: endcap pipeline wait {run_id}")  # fmt: skip
        sleep(min(poll_s, left_s))


def outcome_of(run: Any, host: Host) -> RunState:
    """What the API's run (``V2beta1Run``) says. Pure."""
    details = (run.run_details.task_details if run.run_details is not None else None) or ()
    tasks = [(str(one.display_name or ""), str(one.state or "")) for one in details]
    error = run.error.message if run.error is not None else None
    # Behind a gate that did not pass, Kubeflow makes no step at all, or one that is skipped.
    told = any(name == "compare-champion" for name, _ in tasks)
    registered = any(name == "register-candidate" and state == "SUCCEEDED" for name, state in tasks)
    return RunState(
        _known(run, "run_id", host), str(run.state or "PENDING"), registered if told else None,
        tuple(name for name, state in tasks if state == "FAILED"), str(error) if error else None,
    )  # fmt: skip


class _AwayError(TargetError):
    """No answer, or one that says to come back later."""


@contextmanager
def _client(host: Host) -> Iterator[Any]:
    """The generated client; what it raises becomes our error."""
    import kfp_server_api as api
    import urllib3

    configuration = api.Configuration(host=host.url.rstrip("/"))
    # A connection that could not be made is tried again; nothing that may have been sent is. No redirect is followed:
    # it leads to a login page.
    configuration.retries = urllib3.Retry(total=None, connect=2, read=False, redirect=False, status=False, other=0)
    if host.ca is not None:
        configuration.ssl_ca_cert = str(host.ca)
    secret = ""
    if host.token is not None:
        secret = host.token()
        configuration.api_key["authorization"] = secret
        configuration.api_key_prefix["authorization"] = "Bearer"
    with api.ApiClient(configuration) as client:
        try:
            yield client
        except api.ApiException as error:
            raise _refused(host, error, secret) from None  # the client's exception holds the headers
        except urllib3.exceptions.HTTPError as error:
            raise _AwayError(f"does not answer ({type(error).__name__})", where=host.url,
                             next_step="check the host, and that it is reached from here") from error  # fmt: skip
        except (ValueError, TypeError) as error:  # a body that the swagger's models do not take
            raise _not_kubeflow(host) from error


def _refused(host: Host, error: Any, secret: str) -> EndcapError:
    said = _message(error.body)
    if secret:
        said = said.replace(secret, "(token)")
    suffix = f": {said}" if said else ""
    status = int(error.status or 0)
    if 300 <= status < 400:
        return TargetError(f"redirects to {_origin(error.headers)}, as a login page does", where=host.url,
                           next_step="give a token (KFP_TOKEN or --token-file), or the API's own URL")  # fmt: skip
    if status == 401:
        return TargetError(f"the token is missing, wrong or has ended{suffix}", where=host.url,
                           next_step="put a new one into KFP_TOKEN or --token-file")  # fmt: skip
    if status == 403:
        return TargetError(f"not allowed{suffix}", where=host.url,
                           next_step="check --namespace, and the token's role in it")  # fmt: skip
    if status == 404 and not said:
        return _not_kubeflow(host)
    if status == 429 or status >= 500:
        return _AwayError(f"answers {status}{suffix}", where=host.url, next_step="try again later")
    if status == 400:
        return InputError(f"Kubeflow Pipelines does not take it{suffix}", where=host.url)
    return TargetError(f"answers {status}{suffix}", where=host.url)


def _message(body: Any) -> str:
    """What an error's body says, in one bounded line; empty where it is not the API's own."""
    try:
        document = json.loads(body)
        text = document["message"] or document["error"]
    except (ValueError, TypeError, KeyError):
        return ""
    return " ".join(str(text).split())[:400]


def _origin(headers: Any) -> str:
    parts = urlsplit(str((headers or {}).get("location", "")))
    return f"{parts.scheme}://{parts.hostname}" if parts.hostname else "another page"


def _not_kubeflow(host: Host) -> TargetError:
    return TargetError("does not answer as Kubeflow Pipelines' API v2 does", where=host.url,
                       next_step="check the URL; behind Kubeflow's dashboard it ends with /pipeline")  # fmt: skip


def _known(document: Any, name: str, host: Host) -> str:
    """An id of an answer; a page of HTML deserialises to a model of Nones."""
    value = getattr(document, name, None)
    if not isinstance(value, str) or not value:
        raise _not_kubeflow(host)
    return value


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _experiment(api: Any, client: Any, host: Host, name: str) -> str:
    """The experiment's id; made where there is none of that name."""
    service = api.ExperimentServiceApi(client)
    where = {} if host.namespace is None else {"namespace": host.namespace}
    found = service.experiment_service_list_experiments(filter=_named(name), page_size=_PAGE,
                                                        _request_timeout=host.request_timeout_s, **where)  # fmt: skip
    for one in found.experiments or ():
        if one.display_name == name:
            if one.storage_state == "ARCHIVED":
                raise InputError(f"the experiment {name!r} is archived", where=host.url,
                                 next_step="give another --experiment, or restore it in Kubeflow")  # fmt: skip
            return _known(one, "experiment_id", host)
    made = service.experiment_service_create_experiment(
        experiment=api.V2beta1Experiment(display_name=name, namespace=host.namespace),
        _request_timeout=host.request_timeout_s,
    )
    return _known(made, "experiment_id", host)


def _recurring(service: Any, host: Host, experiment: str, name: str) -> Sequence[Any]:
    found: list[Any] = []
    page = ""
    while True:
        answer = service.recurring_run_service_list_recurring_runs(
            experiment_id=experiment, filter=_named(name), page_size=_PAGE, page_token=page,
            _request_timeout=host.request_timeout_s,
        )  # fmt: skip
        found += [one for one in answer.recurring_runs or () if one.display_name == name]
        page = answer.next_page_token or ""
        if not page:
            return found


def _runtime(api: Any, job: Job) -> Any:
    return api.V2beta1RuntimeConfig(parameters=dict(job.parameters), pipeline_root=job.pipeline_root)


def _digest(job: Job, cron: str) -> str:
    """Of all that a schedule says: two that say the same are the same."""
    document = {
        "pipeline": job.compiled, "parameters": dict(job.parameters), "cron": " ".join(cron.split()),
        "service_account": job.service_account, "pipeline_root": job.pipeline_root,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _age(one: Any) -> tuple[str, str]:
    return (re.sub(r"[^0-9]", "", str(one.created_at)), str(one.recurring_run_id))
