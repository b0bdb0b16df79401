"""What the kserve package's own inference client finds at a server of ours, directly or through the gateway."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

__all__ = ["Found", "ask"]


@dataclass(frozen=True)
class Found:
    """``answer`` is to two histories, [0, 1, 2] and [3, 4, 5]."""

    live: bool
    ready: bool
    model_ready: bool
    other_ready: bool
    answer: Any


def ask(url: str) -> Found:
    from kserve import InferInput, InferRequest  # type: ignore[import-untyped]
    from kserve.inference_client import InferenceRESTClient, RESTConfig  # type: ignore[import-untyped]

    async def talk() -> Found:
        async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
            tensor = InferInput("history", [2, 3], "INT64", data=[[0, 1, 2], [3, 4, 5]])
            return Found(
                live=await client.is_server_live(url),
                ready=await client.is_server_ready(url),
                model_ready=await client.is_model_ready(url, "recommender"),
                other_ready=await client.is_model_ready(url, "other"),
                answer=await client.infer(
                    url, InferRequest("recommender", [tensor], request_id="q"), model_name="recommender"
                ),
            )

    return asyncio.run(talk())
