"""The body of ``POST /v1/feedback``, purely: which events in it are sound, and why others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from endcap.errors import InputError
from serving import impressions
from serving.feedback.attribution import EventType
from serving.impressions import Impression, Keys

__all__ = ["MAX_EVENTS", "Event", "Refusal", "parse_feedback"]

MAX_EVENTS = 100
_MAX_ITEM_CHARS = 256
_TYPES = {kind.value: kind for kind in EventType}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a shopper did with an impression. ``item``: external item id, where it was told."""

    impression: Impression
    type: EventType
    item: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """``index``: place in the request's list."""

    index: int
    reason: str


def parse_feedback(body: bytes, key: bytes | Keys) -> tuple[list[Event], list[Refusal]]:
    """``{"events": [{"impression": token, "type": "shown"|"clicked", "item"?: str, "version"?: str}, ...]}``.

    The version that counts is the token's; one that the client names must be the same.

    Raises:
        InputError: the body as a whole is not of this form.
    """
    example = 'send {"events": [{"impression": "<token>", "type": "shown"}]}'
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON ({error.msg})", where="body", next_step=example) from error
    events = document.get("events") if type(document) is dict else None
    if type(events) is not list:
        raise InputError("events must be a list", where="events", next_step=example)
    if not 1 <= len(events) <= MAX_EVENTS:
        raise InputError(f"{len(events)} events", where="events", next_step=f"send 1 to {MAX_EVENTS} at once")
    good: list[Event] = []
    refused: list[Refusal] = []
    for index, raw in enumerate(events):
        try:
            good.append(_event(raw, key))
        except InputError as error:
            refused.append(Refusal(index, error.what))
    return good, refused


def _event(raw: Any, key: bytes | Keys) -> Event:
    if type(raw) is not dict:
        raise InputError("an event must be a JSON object")
    kind = _TYPES.get(raw["type"]) if type(raw.get("type")) is str else None
    if kind is None:
        raise InputError("type must be shown or clicked")
    token, item, version = raw.get("impression"), raw.get("item"), raw.get("version")
    if type(token) is not str:
        raise InputError("impression must be the token of the answer")
    if item is not None and (type(item) is not str or len(item) > _MAX_ITEM_CHARS):
        raise InputError(f"item must be a string of at most {_MAX_ITEM_CHARS} characters")
    impression = impressions.read(key, token)
    if version is not None and version != impression.version:
        raise InputError("version is not the one that made this impression")
    return Event(impression, kind, item)
