"""For plain Locust: ``locust -f loadtests/locustfile.py --headless --users 1``, with its own statistics and pages.

The target comes from ENDCAP_TARGET (or the service from ``--host``), the rest from ENDCAP_SHOPPERS, ENDCAP_RATE,
ENDCAP_SEED and ENDCAP_RECORDS. One Locust user is the whole load: it sends all arrivals by their schedule.
"""

from __future__ import annotations

import os
from pathlib import Path

from locust import events
from locust.env import Environment

from endcap.errors import InputError
from loadtests.config import LoadConfig
from loadtests.generator import Session, ShopperTraffic

__all__ = ["ShopperTraffic"]

# One dispatcher is the load; more of them would double it.
ShopperTraffic.fixed_count = 1


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def set_up(environment: Environment, **_: object) -> None:
    variables = os.environ
    if "ENDCAP_SHOPPERS" not in variables:
        raise InputError("no shoppers file", next_step="set ENDCAP_SHOPPERS to the file that the pipeline wrote")
    target = variables.get("ENDCAP_TARGET")
    ShopperTraffic.session = Session(
        LoadConfig(
            target=Path(target) if target else None,
            url=environment.host or None,
            shoppers=Path(variables["ENDCAP_SHOPPERS"]),
            out=Path(variables.get("ENDCAP_RECORDS", "out/records")),
            rate_rps=float(variables.get("ENDCAP_RATE", "150")),
            seed=int(variables.get("ENDCAP_SEED", "7")),
        )
    )


@events.test_stopping.add_listener  # type: ignore[untyped-decorator]
def stop_arrivals(**_: object) -> None:
    session = ShopperTraffic.session
    if session is not None:
        session.stopping.set()
        session.ended.wait(session.config.timeout_s + 3)


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def finish(**_: object) -> None:
    session = ShopperTraffic.session
    if session is not None:
        ShopperTraffic.session = None
        session.finish()
