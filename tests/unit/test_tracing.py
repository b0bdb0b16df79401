"""Whether OpenTelemetry's own variables turn traces on, and what the gateway makes of them."""

from __future__ import annotations

import pytest

from endcap.errors import InputError
from serving.gateway import Traces, traces_of
from serving.tracing import traces_endpoint

ENDPOINT, OWN = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "shop", "OTEL_TRACES_SAMPLER": "always_on"}, None),
        ({ENDPOINT: "http://otel:4318"}, "http://otel:4318/v1/traces"),
        ({ENDPOINT: "http://otel:4318/"}, "http://otel:4318/v1/traces"),
        ({OWN: "https://otel/traces", ENDPOINT: "http://other:4318"}, "https://otel/traces"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http://localhost:4318/v1/traces"),
        ({ENDPOINT: "http://otel:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({ENDPOINT: "http://otel:4318", "OTEL_SDK_DISABLED": "True"}, None),
        ({ENDPOINT: "http://otel:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "http://otel:4318/v1/traces"),
    ],
)
def test_where_spans_go(said: dict[str, str], expected: str | None) -> None:
    assert traces_endpoint(said) == expected


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
        ({ENDPOINT: "http://otel:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({ENDPOINT: "http://otel:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
          "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
        ({ENDPOINT: "otel:4318"}, ENDPOINT),
        ({ENDPOINT: "http://otel:port"}, ENDPOINT),
    ],
)  # fmt: skip
def test_what_endcap_does_not_have_is_refused_with_the_variable_s_name(said: dict[str, str], where: str) -> None:
    with pytest.raises(InputError) as refused:
        traces_endpoint(said)
    assert refused.value.where == where


def test_the_gateway_takes_address_and_sampler() -> None:
    assert traces_of({}) is None
    assert traces_of({ENDPOINT: "http://otel:4318"}) == Traces("otel", 4318, "/v1/traces", 1.0)
    ratio = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    assert traces_of({OWN: "http://[::1]/t", **ratio}) == Traces("::1", 80, "/t", 0.25)
    assert traces_of({ENDPOINT: "http://otel:4318", "OTEL_TRACES_SAMPLER": "always_off"}) == Traces(
        "otel", 4318, "/v1/traces", 0.0
    )
    for wrong in ({ENDPOINT: "https://otel:4318"}, {ENDPOINT: "http://otel:4318", **ratio,
                                                    "OTEL_TRACES_SAMPLER_ARG": "2"}):  # fmt: skip
        with pytest.raises(InputError):
            traces_of(wrong)
