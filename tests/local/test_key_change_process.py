"""Impression keys are changed under a running model server and collector, and no event is refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx

from endcap.files import write_atomic
from endcap.package import ensure_signing_key
from endcap.processes import free_port
from serving import impressions
from serving.impressions import Keys
from tests.packages import ITEMS, make_package
from tests.process import Program, started, wait_until

OLD, NEW = bytes(32), bytes(range(32))


def test_keys_are_changed_in_service_without_losing_an_impression(tmp_path: Path) -> None:
    ensure_signing_key(tmp_path / "keys")
    package = make_package(tmp_path / "package")
    path = tmp_path / "impression.key"

    def hold(keys: Keys) -> None:
        lines = (f"{'next ' * (place < keys.signing)}{key.hex()}\n" for place, key in enumerate(keys.every))
        write_atomic(path, "".join(lines), mode=0o600)

    hold(Keys((OLD,)))
    ports = free_port(), free_port()
    server = started(
        ["-m", "serving.server", "--package", str(package), "--public-key", str(tmp_path / "keys" / "signing.pub"),
         "--version", "2", "--zone", "a", "--port", str(ports[0]), "--impression-key", str(path)],
        ports[0], tmp_path / "server.log",
    )  # fmt: skip
    collector = started(
        ["-m", "serving.feedback", "--database", str(tmp_path / "feedback.sqlite"), "--impression-key", str(path),
         "--window-s", "3600", "--port", str(ports[1])],
        ports[1], tmp_path / "collector.log",
    )  # fmt: skip
    kept: list[str] = []

    def shown(models: Program, events: Program) -> str:
        body = {"shopper": "1", "history": [ITEMS[3]], "k": 1}
        token: str = httpx.post(models.url + "/v1/recommend", json=body, timeout=30.0).json()["impression"]
        kept.append(token)
        assert sent(events, token)["accepted"] == 1
        return token

    def sent(events: Program, token: str) -> Any:
        body = {"events": [{"impression": token, "type": "shown"}]}
        return httpx.post(events.url + "/v1/feedback", json=body, timeout=30.0).json()

    with server as models, collector as events:
        models.wait_for("/v2/health/ready")
        events.wait_for("/healthz")
        for keys in (Keys((OLD,)), Keys((NEW, OLD), signing=1), Keys((NEW, OLD)), Keys((NEW,))):
            hold(keys)

            def signed_anew(wanted: Keys = keys) -> bool:
                """By the key of this file; several keys make format 2."""
                token = shown(models, events)
                form = base64.urlsafe_b64decode(token[:4])[0]
                return form == min(2, len(wanted.every)) and _made_by(wanted.signs, token)

            wait_until(signed_anew, "the server signs as the file says")
        hashes = {impressions.read(Keys((NEW, OLD)), token).shopper_hash for token in kept}
        assert len(hashes) == 2  # one as long as the old key was there, one after
        wait_until(lambda: "forged" in str(sent(events, kept[0])), "the old key is gone")
        path.write_text("half a ke")
        name = "endcap_feedback_keys_refused_total 1.0"
        wait_until(lambda: name in events.get("/metrics").text, "a damaged key file is counted")
        shown(models, events)


def _made_by(key: bytes, token: str) -> bool:
    try:
        impressions.read(Keys((key,)), token)
    except impressions.InputError:
        return False
    return True
