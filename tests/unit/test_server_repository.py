"""Load and unload by request: by the operator alone, and never worse than before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from endcap.errors import InputError
from serving.server.admins import AdminKey, Admins
from serving.server.app import Replica, ServerApp
from serving.server.service import load_service
from tests.asgi_client import Answer, AsgiClient
from tests.packages import ITEMS, make_package

KEY = AdminKey(b"an-admin-key-of-some-length")
OPERATOR = [(b"authorization", b"Bearer an-admin-key-of-some-length")]
LOAD, UNLOAD = ("/v2/repository/models/recommender/" + verb for verb in ("load", "unload"))


def client_of(folder: Path, *, admin: AdminKey | None = KEY) -> AsgiClient:
    def load() -> object:
        return load_service(folder / "package", folder / "keys" / "signing.pub")

    app = ServerApp(Replica("7", "a"), impression_key=None, admin=None if admin is None else Admins(admin), load=load)  # type: ignore[arg-type]
    app.open(load())  # type: ignore[arg-type]
    return AsgiClient(app)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[AsgiClient]:
    make_package(tmp_path / "package")
    with client_of(tmp_path) as client:
        yield client
        if client.app.service is not None:
            client.app.service.close()


def recommend(client: AsgiClient) -> Answer:
    return client.post("/v1/recommend", {"shopper": "1", "history": ["100"], "k": 1})


def state(client: AsgiClient) -> list[tuple[str, str]]:
    return [(one["state"], one["reason"]) for one in client.post("/v2/repository/index", b"").json]


def loads(client: AsgiClient, result: str) -> float | None:
    found: float | None = client.app.metrics.registry.get_sample_value(
        "endcap_server_loads_total", {"version": "7", "result": result}
    )
    return found


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
@pytest.mark.parametrize(
    "headers",
    [[], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"")], [(b"authorization", KEY.key)]],
)
def test_only_the_operator_may(client: AsgiClient, path: str, headers: list[tuple[bytes, bytes]]) -> None:
    before = client.app.service
    answer = client.post(path, b"", headers=headers)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert KEY.key.decode() not in answer.body.decode()
    assert client.app.service is before


def test_without_a_key_nobody_may_and_metrics_are_open(tmp_path: Path) -> None:
    make_package(tmp_path / "package")
    with client_of(tmp_path, admin=None) as client:
        assert [client.post(path, b"", headers=OPERATOR).status for path in (LOAD, UNLOAD)] == [403, 403]
        assert client.get("/metrics").status == 200


def test_metrics_ask_for_the_key_too(client: AsgiClient) -> None:
    assert client.get("/metrics").status == 401
    assert client.get("/v2/health/ready").status == 200


def test_a_changed_package_that_verifies_takes_over_and_the_old_one_is_let_go(
    client: AsgiClient, tmp_path: Path
) -> None:
    assert recommend(client).json["items"] == ["101"]
    old = weakref.ref(client.app.service.engine)
    make_package(tmp_path / "package", items=tuple(reversed(ITEMS)))
    assert client.post(LOAD, b"", headers=OPERATOR).status == 200
    assert recommend(client).json["items"] == ["149"]
    assert loads(client, "loaded") == 1
    gc.collect()
    assert old() is None


def test_one_that_does_not_verify_is_refused_and_the_old_one_goes_on(client: AsgiClient, tmp_path: Path) -> None:
    (tmp_path / "package" / "model.onnx").write_bytes(b"another graph")
    before = client.app.service
    answer = client.post(LOAD, b"", headers=OPERATOR)
    assert answer.status == 409
    assert "what served before goes on" in answer.json["error"]
    assert client.app.service is before
    assert recommend(client).json["items"] == ["101"]
    assert (loads(client, "refused"), state(client)) == (1, [("READY", "")])


def test_unloaded_it_is_not_ready_until_it_is_loaded_again(client: AsgiClient) -> None:
    assert client.post(UNLOAD, b"", headers=OPERATOR).status == 200
    assert (recommend(client).status, client.get("/v2/health/ready").status) == (503, 503)
    assert state(client) == [("UNAVAILABLE", "unloaded")]
    assert client.post(LOAD, b"", headers=OPERATOR).status == 200
    assert (recommend(client).status, client.get("/v2/health/ready").status) == (200, 200)


@pytest.mark.parametrize("path", ["/v2/repository/models/other/load", "/v2/repository/models/recommender/drop"])
def test_other_models_and_verbs_are_not_found(client: AsgiClient, path: str) -> None:
    assert client.post(path, b"", headers=OPERATOR).status == 404


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [(b"short", 0o600, "not an admin key"), (b"x" * 16, 0o640, "read by others"), (None, 0, "no admin key")],
)
def test_a_key_file_that_is_none_is_refused(tmp_path: Path, text: bytes | None, mode: int, says: str) -> None:
    path = tmp_path / "admin.key"
    if text is not None:
        path.write_bytes(text)
        path.chmod(mode)
    with pytest.raises(InputError, match=says):
        AdminKey.read(path)


def test_a_key_file_may_end_with_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    path.write_bytes(KEY.key + b"\n")
    path.chmod(0o600)
    assert AdminKey.read(path) == KEY
