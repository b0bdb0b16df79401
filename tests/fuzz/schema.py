"""schemathesis' requests, made from the OpenAPI document that the server publishes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import requests  # type: ignore[import-untyped]
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup

from tests.fuzz.wire import WAIT_S

__all__ = ["Case", "Schema"]

_CHECKS = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")


@dataclass(frozen=True, slots=True)
class Case:
    """One request and what came back. ``caused``: a refusal for load or lateness that says so."""

    command: str
    status: int = 0
    text: str = ""
    caused: bool = False
    hang: str = ""
    undocumented: str = ""


class Schema:
    """The document of the server at ``address``, and strategies for all its operations."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._url = f"http://{address[0]}:{address[1]}"
        self._session = requests.Session()
        self._session.trust_env = False
        load_all_checks()
        self._checks = CHECKS.get_by_names(list(_CHECKS))
        document = self._session.get(f"{self._url}/openapi.json", timeout=WAIT_S).json()
        operations: Any = schemathesis.openapi.from_dict(document).get_all_operations()
        found = [one.ok() for one in operations]
        self._operations = sorted(found, key=lambda one: (one.path, one.method))
        self._strategies: dict[tuple[str, GenerationMode], Any] = {}

    def send(self, count: int, *, seed: int) -> Iterator[Case]:
        """About ``count`` requests: most to operations with a body, in both modes (as the document says, and not)."""
        rich = [one for one in self._operations if one.body]
        poor = [one for one in self._operations if not one.body]
        few = max(1, count // (5 * len(poor)))
        for one in poor[: count // 5]:
            yield from self._of(one, GenerationMode.POSITIVE, few, seed)
        for one in rich:
            for mode in GenerationMode:
                yield from self._of(one, mode, max(1, count * 4 // (5 * 2 * len(rich))), seed)

    def _of(self, operation: Any, mode: GenerationMode, count: int, number: int) -> list[Case]:
        key = (operation.label, mode)
        if key not in self._strategies:
            self._strategies[key] = operation.as_strategy(generation_mode=mode)
        cases: list[Case] = []

        @seed(number)
        @settings(max_examples=count, database=None, phases=[Phase.generate], deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(self._strategies[key])
        def one(case: Any) -> None:
            cases.append(self._sent(case))

        try:
            one()
        except Unsatisfiable:  # nothing can be wrong with a request without parameters
            return []
        return cases

    def _sent(self, case: Any) -> Case:
        try:
            answer = case.call(base_url=self._url, session=self._session, timeout=WAIT_S)
        except requests.exceptions.Timeout as error:
            return Case(str(case), hang=f"{case.method} {case.path}: {error}")
        except requests.exceptions.RequestException as error:
            return Case(str(case), status=599, text=f"{case.method} {case.path}: {error}")
        undocumented = ""
        try:
            case.validate_response(answer, checks=self._checks)
        except FailureGroup as failure:
            undocumented = f"{case.method} {case.path} {answer.status_code}: {failure.exceptions[0]}"[:400]
        caused = "retry-after" in answer.headers or bool((case.headers or {}).get("x-request-deadline-ms"))
        return Case(case.as_curl_command()[:500], answer.status_code, answer.text[:300], caused, "", undocumented)
