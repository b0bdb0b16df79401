"""What a supervisor is told, what it keeps, and what goes over the control API."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import (
    CapacityError,
    EndcapError,
    FencedError,
    InputError,
    StateError,
    TargetError,
    VerificationError,
)
from serving.targets import (
    Counts,
    ModelVersion,
    Observation,
    ShadowObservation,
    StickyKey,
    SupervisorConfig,
    VersionObservation,
    open_target,
)
from serving.targets.config import Kept, KeptShadow, KeptSticky, KeptVersion, read_config, read_state, write_state
from serving.targets.control import status_of
from serving.targets.fleet import backoff_s
from serving.targets.wire import ObservationReply, SharesRequest

CONFIG = SupervisorConfig(folder=Path("/t"), records=Path("/r"), public_key=Path("/k"))


def test_a_version_with_half_the_requests_or_more_has_two_replicas_a_zone() -> None:
    needed = [CONFIG.replicas_per_zone(share) for share in (0.0, 0.0001, 0.05, 0.4999, 0.5, 1.0)]
    assert needed == [0, 1, 1, 1, 2, 2]


def test_state_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    version = KeptVersion(label="1", package=Path("/p"), replicas_per_zone=2)
    kept = Kept(
        token=7, holder="rollout", versions=(version,), shares=(("1", 1.0),), gateway_port=80,
        sticky=KeptSticky(header="x-endcap-shopper"), shadow=KeptShadow(label="1", share=0.5),
    )  # fmt: skip
    write_state(tmp_path, kept)
    assert read_state(tmp_path) == kept
    assert read_state(tmp_path / "elsewhere") is None


def test_a_state_from_before_stickiness_and_shadows_still_loads(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(
        '{"format": 1, "token": 3, "holder": "x", "versions": [{"label": "1", "package": "/p",'
        ' "replicas_per_zone": 1}], "shares": [["1", 1.0]], "gateway_port": 9,'
        ' "attempts_offset": 5, "access_offset": 6}'
    )
    kept = read_state(tmp_path)
    assert kept is not None
    assert (kept.token, kept.sticky, kept.shadow) == (3, None, None)


def test_a_shadow_that_is_no_version_is_a_damaged_state(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 1, "shadow": {"label": "9", "share": 0.5}}')
    with pytest.raises(StateError, match=r"state\.json"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "key", [StickyKey(), StickyKey(header="a", cookie="b"), StickyKey(header="a b"), StickyKey(cookie="x" * 65)]
)
def test_a_sticky_key_is_one_name(key: StickyKey) -> None:
    with pytest.raises(InputError, match="one header or one cookie"):
        SharesRequest.of({ModelVersion("1", Path("/p")): 1.0}, 1, sticky=key)


@given(st.binary(max_size=60))
def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("state")
    (folder / "state.json").write_bytes(raw)
    try:
        assert read_state(folder) is not None
    except StateError as error:
        assert error.where == str(folder / "state.json")


def test_a_config_that_does_not_validate_says_which_field(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"folder": "/t", "records": "/r", "public_key": "/k", "gateway_port": 70000}')
    with pytest.raises(InputError, match="gateway_port"):
        read_config(path)
    path.write_text('{"folder": "t", "records": "/r", "public_key": "/k"}')
    with pytest.raises(InputError, match="absolute"):
        read_config(path)


@pytest.mark.parametrize("label", ["../up", "a/b", "", "-x", "x" * 70, "a b"])
def test_a_label_is_never_a_path(label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        SharesRequest.of({ModelVersion(label, Path("/p")): 1.0}, 1)


counts = st.builds(Counts, st.integers(0, 10**9), st.integers(0, 10**9))
versions = st.builds(
    VersionObservation, attempts=counts, within_ms=st.dictionaries(st.integers(1, 60_000), counts, max_size=3),
    requests=counts, impressions=counts, impressions_open=st.integers(0, 100), shoppers=counts,
    measured=st.dictionaries(st.text(max_size=3), counts, max_size=2), ready_replicas=st.integers(0, 4),
    replicas=st.integers(0, 4),
)  # fmt: skip
shadows = st.builds(
    ShadowObservation, version=st.text(max_size=3), answered=counts,
    within_ms=st.dictionaries(st.integers(1, 60_000), counts, max_size=3), pairs=st.integers(0, 100),
    overlap=st.floats(0, 1), score_drift=st.floats(0, 10),
)  # fmt: skip
observations = st.builds(
    Observation, at_s=st.floats(0, 2e9), shares=st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=3),
    versions=st.dictionaries(st.text(max_size=3), versions, max_size=3), outcomes=counts,
    window_s=st.none() | st.floats(0.1, 1e6), shadow=st.none() | shadows,
)  # fmt: skip


@given(observations)
def test_an_observation_crosses_the_control_api_unchanged(observation: Observation) -> None:
    raw = ObservationReply.of(observation).model_dump_json()
    arrived = ObservationReply.model_validate_json(raw).to_domain()
    assert arrived == observation
    assert list(arrived.shares) == list(observation.shares)


@pytest.mark.parametrize(
    ("error", "status"),
    [(FencedError("x"), 409), (VerificationError("x"), 422), (InputError("x"), 400), (CapacityError("x"), 503)],
)
def test_errors_cross_the_control_api_as_their_own_kind(error: EndcapError, status: int) -> None:
    assert status_of(error) == status
    assert type(EndcapError.from_json(error.to_json())) is type(error)


def test_restarts_wait_longer_each_time_and_never_long() -> None:
    waits = [backoff_s(failures) for failures in range(12)]
    assert waits == sorted(waits)
    assert waits[0] == 0.0
    assert waits[-1] == 5.0


def test_no_target_named_or_none_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENDCAP_TARGET", raising=False)
    with pytest.raises(InputError, match="ENDCAP_TARGET"):
        open_target()
    monkeypatch.setenv("ENDCAP_TARGET", str(tmp_path))
    with pytest.raises(TargetError, match="no target runs here"):
        open_target()
    (tmp_path / "target.json").write_text('{"pid": 1}')
    with pytest.raises(StateError, match="damaged"):
        open_target(tmp_path)
