"""Load and unload by request, and who may ask for it.

The model repository extension of the Open Inference Protocol, for the one package that this process was started with:
``load`` reads its folder again, verifies it and only then takes it into service; where that fails, what served before
goes on. ``unload`` lets go of it: readiness fails until it is loaded again. Both are the operator's alone: where
the configuration names neither an admin key nor tokens there is neither.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from endcap.errors import EndcapError, InputError
from serving.asgi import Headers
from serving.server.admins import Admins
from serving.server.oip import UnknownModelError
from serving.server.service import Service

if TYPE_CHECKING:
    from serving.server.app import ServerApp

__all__ = ["REPOSITORY_PATH", "ForbiddenError", "Repository", "UnloadableError"]

REPOSITORY_PATH = "/v2/repository/"
_VERB = re.compile(r"/v2/repository/models/([^/]+)/(load|unload)")


class ForbiddenError(InputError):
    """This server does not do that, whoever asks: 403."""


class UnloadableError(EndcapError):
    """The package is refused, or another load is under way; what served before goes on: 409."""


class Repository:
    """The one package of this process.

    Args:
        load: verifies and loads it again; blocks. None: this process cannot (its workers share one copy).
        admins: None: nobody may load or unload.
    """

    def __init__(self, app: ServerApp, load: Callable[[], Service] | None, admins: Admins | None) -> None:
        self._app = app
        self._load = load
        self._admins = admins
        self._name: str | None = None
        self._busy = False

    async def answer(self, path: str, headers: Headers) -> bytes:
        """The body of the answer to a POST below :data:`REPOSITORY_PATH`.

        Raises:
            UnknownModelError: no such path, or another model.
            NotAllowedError, ForbiddenError, UnloadableError: see there.
        """
        if path == REPOSITORY_PATH + "index":
            return orjson.dumps(self._index())
        found = _VERB.fullmatch(path)
        if found is None:
            raise UnknownModelError("no such path", where=path)
        await (self.load if found[2] == "load" else self.unload)(found[1], headers)
        return b"{}"

    def _index(self) -> list[dict[str, str]]:
        service = self._app.service
        if service is not None:
            self._name = service.manifest.name
        if self._name is None:
            return []
        state, reason = ("READY", "") if self._app.ready else ("UNAVAILABLE", "draining" if service else "unloaded")
        return [{"name": self._name, "version": self._app.version, "state": state, "reason": reason}]

    async def load(self, name: str, headers: Headers) -> None:
        """Read the package again and go on with it.

        Raises:
            UnloadableError: it does not verify, or cannot be served; what served before goes on.
        """
        load = self._allow(name, headers)
        if self._busy:
            raise UnloadableError("the package is being loaded already", where=name, next_step="wait for that")
        self._busy = True
        try:
            service = await asyncio.get_running_loop().run_in_executor(None, load)
        except EndcapError as error:
            self._app.metrics.loads["refused"].inc()
            raise UnloadableError(f"refused, what served before goes on: {error.what}", where=name,
                                  next_step="correct the package's folder, then load again") from error  # fmt: skip
        finally:
            self._busy = False
        if service.manifest.name != name:
            self._app.metrics.loads["refused"].inc()
            raise UnloadableError(f"refused: the folder holds {service.manifest.name} now", where=name)
        self._app.metrics.loads["loaded"].inc()
        self._app.open(service)

    async def unload(self, name: str, headers: Headers) -> None:
        """Let go of the package; requests that run with it finish."""
        self._allow(name, headers)
        self._app.shut()

    def _allow(self, name: str, headers: Headers) -> Callable[[], Service]:
        if self._admins is None:
            raise ForbiddenError("nobody may load or unload here", where="server",
                                 next_step="start the server with --admin-key or --jwt-keys")  # fmt: skip
        self._admins.check(headers)
        if self._load is None:
            raise ForbiddenError("workers that share one copy of a package do not load another", where="server",
                                 next_step="restart the server, or start it without --processes")  # fmt: skip
        if self._app.service is not None:
            self._name = self._app.service.manifest.name
        if self._name is not None and self._name != name:
            raise UnknownModelError("no such model", where=name, next_step=f"ask for {self._name}")
        if self._name is None:
            raise UnloadableError("the package is being loaded already", where=name, next_step="wait for that")
        return self._load
