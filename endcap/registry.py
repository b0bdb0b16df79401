"""The model registry: MLflow, with packages as model versions.

Named by a URI as in ``MLFLOW_TRACKING_URI``: ``sqlite:////folder/mlflow.db`` (packages lie in ``/folder/artifacts``)
or a server's ``http(s)://``. A version's package comes back bit for bit, or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endcap.errors import InputError, RegistryError, from_os_error
from endcap.files import replaced_folder, sha256_file
from endcap.package.contract import MANIFEST_FILE, read_manifest, verify_digests

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["CANDIDATE", "CHAMPION", "ModelVersion", "Registry", "Resolved", "sqlite_uri"]

CHAMPION = "champion"
"""Alias of the version that shoppers are served."""
CANDIDATE = "candidate"
"""Alias of the version registered last."""

_REFERENCE = re.compile(
    r"models:/(?P<name>[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)(?:/(?P<version>\d+)|@(?P<alias>[-a-z0-9_]+))"
)
_DIGEST_TAG = "endcap.package_sha256"
_LOCK_WAIT_S = 3.0


@dataclass(frozen=True)
class ModelVersion:
    """What the registry says of one version."""

    name: str
    version: str
    digest: str
    """SHA-256 of the package's manifest, which holds the digests of all its other files."""
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    """Lineage: ``data_sha256``, ``git_commit``, ``pipeline_run``, ..."""
    created_at_s: float


@dataclass(frozen=True)
class Resolved:
    """A version whose package lies in a folder here."""

    version: str
    package: Path
    digest: str


def sqlite_uri(folder: Path) -> str:
    """The URI of the registry kept in ``folder``."""
    return f"sqlite:///{folder.resolve() / 'mlflow.db'}"


class Registry:
    """One registry. Opening it does nothing; the store is made by the first :meth:`register`.

    All methods raise RegistryError for a store that is missing, locked, damaged or out of reach.
    """

    def __init__(self, uri: str) -> None:
        if not uri.startswith(("sqlite:///", "http://", "https://", "postgresql", "mysql")):
            raise InputError(
                f"{uri!r} names no registry", next_step="give sqlite:////folder/mlflow.db or http(s)://..."
            )
        self.uri = uri
        self._database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        self._made: MlflowClient | None = None

    def exists(self) -> bool:
        """Whether there is a store (a server's is taken to be)."""
        return self._database is None or self._database.is_file()

    def register(
        self,
        package: Path,
        *,
        name: str,
        metrics: Mapping[str, float],
        params: Mapping[str, object],
        tags: Mapping[str, str],
        plots: Sequence[Path] = (),
        run_name: str | None = None,
        aliases: Sequence[str] = (CANDIDATE,),
    ) -> ModelVersion:
        """Keep ``package`` as the next version of ``name``; the first call makes the store.

        Args:
            package: a sealed package folder; it is copied.
            metrics: offline quality by name.
            params: how it was trained.
            tags: lineage; on the version and on its MLflow run.
            plots: image files kept with the run.
            aliases: set on the new version (moved from the version that had them).

        Raises:
            PackageError: not a package.
            VerificationError: its files are not those that its manifest names.
        """
        verify_digests(package, read_manifest(package))
        digest = sha256_file(package / MANIFEST_FILE)
        with self._errors("registering a model version"):
            from mlflow.entities import Metric, Param

            now_ms = int(time.time() * 1000)
            client = self._client(make=True)
            run = client.create_run(self._experiment(client, name), run_name=run_name, tags=dict(tags))
            run_id = run.info.run_id
            client.log_batch(
                run_id,
                metrics=[Metric(key, float(number), now_ms, 0) for key, number in metrics.items()],
                params=[Param(key, str(value)) for key, value in params.items()],
            )
            client.log_artifacts(run_id, str(package), "package")
            for plot in plots:
                client.log_artifact(run_id, str(plot), "plots")
            client.set_terminated(run_id)
            if not client.search_registered_models(filter_string=f"name = '{name}'"):
                client.create_registered_model(name)
            made = client.create_model_version(name, source=f"{run.info.artifact_uri}/package", run_id=run_id,
                                               tags={**tags, _DIGEST_TAG: digest})  # fmt: skip
            for alias in aliases:
                client.set_registered_model_alias(name, alias, made.version)
        return self.version(name, str(made.version))

    def champion(self, name: str) -> ModelVersion | None:
        """The version that shoppers are served; None where none was set (or there is no store yet)."""
        if not self.exists():
            return None
        with self._errors("reading the champion"):
            found = self._by_alias(name, CHAMPION)
        return None if found is None else self.version(name, found)

    def set_champion(self, name: str, version: str) -> None:
        """Make ``version`` the champion of ``name``."""
        self.version(name, version)
        with self._errors("setting the champion"):
            self._client().set_registered_model_alias(name, CHAMPION, version)

    def version(self, name: str, version: str) -> ModelVersion:
        """What the registry says of a version.

        Raises:
            RegistryError: there is no such version.
        """
        with self._errors(f"reading version {version} of {name}"):
            found = self._client().get_model_version(name, version)
            aliases = self._client().get_registered_model(name).aliases
        return _model_version(found, aliases)

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of ``name``, newest first; empty where there are none."""
        with self._errors(f"listing versions of {name}"):
            client = self._client()
            models = client.search_registered_models(filter_string=f"name = '{name}'")
            if not models:
                return []
            found = client.search_model_versions(f"name = '{name}'")
        listed = [_model_version(version, models[0].aliases) for version in found]
        return sorted(listed, key=lambda version: -int(version.version))

    def resolve(self, reference: str, *, destination: Path | None = None) -> Resolved:
        """The package of ``models:/recommender/7`` or ``models:/recommender@champion``.

        Args:
            destination: copy it to this folder (whole or not at all); None: where a folder here holds it, that folder.

        Raises:
            InputError: no such form of reference.
            RegistryError: no such version, or its package is gone or is not what was registered.
        """
        parts = _REFERENCE.fullmatch(reference)
        if parts is None:
            raise InputError(f"{reference!r} names no model version",
                             next_step="write models:/NAME/VERSION or models:/NAME@champion")  # fmt: skip
        name, version = parts["name"], parts["version"]
        with self._errors(f"resolving {reference}"):
            client = self._client()
            if version is None:
                version = self._by_alias(name, parts["alias"])
                if version is None:
                    raise RegistryError(f"{name} has no {parts['alias']}", where=self.uri,
                                        next_step="see `endcap model list`")  # fmt: skip
            found = client.get_model_version(name, version)
            source = client.get_model_version_download_uri(name, version)
        expected = found.tags.get(_DIGEST_TAG, "")
        folder = _local_folder(source)
        if folder is None or destination is not None:
            folder = self._fetch(source, folder, destination or Path(tempfile.mkdtemp(prefix="endcap-package-")))
        if not (folder / MANIFEST_FILE).is_file():
            raise RegistryError(f"the package of {reference} is gone", where=folder,
                                next_step="restore the registry's artifacts, or register it again")  # fmt: skip
        digest = sha256_file(folder / MANIFEST_FILE)
        if digest != expected:
            raise RegistryError(f"the package of {reference} is not the one that was registered", where=folder,
                                next_step="restore the registry's artifacts; do not serve this one")  # fmt: skip
        return Resolved(version, folder, digest)

    def _fetch(self, source: str, folder: Path | None, destination: Path) -> Path:
        """Copy a version's files into ``destination`` by a rename, so that it is never half there."""
        try:
            with replaced_folder(destination) as scratch:
                if folder is not None:
                    shutil.copytree(folder, scratch)
                else:
                    import mlflow.artifacts

                    with self._errors("fetching a package"):
                        scratch.mkdir()
                        found = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(scratch),
                                                                    tracking_uri=self.uri)  # fmt: skip
                    _lift(Path(found), scratch)
        except FileNotFoundError as error:
            raise RegistryError("the package's files are gone", where=folder or source) from error
        except OSError as error:
            raise from_os_error(error, doing=f"copying a package to {destination}") from error
        return destination

    def _by_alias(self, name: str, alias: str) -> str | None:
        models = self._client().search_registered_models(filter_string=f"name = '{name}'")
        return str(models[0].aliases[alias]) if models and alias in models[0].aliases else None

    def _experiment(self, client: MlflowClient, name: str) -> str:
        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = None if self._database is None else str(self._database.parent / "artifacts")
        return str(client.create_experiment(name, artifact_location=location))

    def _client(self, *, make: bool = False) -> MlflowClient:
        self._probe(make=make)
        if self._made is None:
            from mlflow import MlflowClient

            self._made = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        return self._made

    def _probe(self, *, make: bool) -> None:
        """Find out in time what MLflow would wait twenty seconds for, or quietly make anew."""
        database = self._database
        if database is None:
            return
        if not database.is_file():
            if not make:
                raise RegistryError("the registry's store is missing", where=database,
                                    next_step="run `endcap pipeline run`, or name another (--registry)")  # fmt: skip
            _make_store(database)
            return
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=_LOCK_WAIT_S, isolation_level=None)) as store:
                store.execute("BEGIN IMMEDIATE" if make else "BEGIN")
                (tables,) = store.execute("SELECT count(*) FROM sqlite_master").fetchone()
                store.execute("ROLLBACK")
        except sqlite3.DatabaseError as error:
            raise _store_error(error, database) from error
        if not tables:  # MLflow would quietly begin a new registry in it
            raise RegistryError("the registry's store is empty, not one that MLflow made", where=database,
                                next_step="restore it from a backup, or move it away to begin a new one")  # fmt: skip

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """What MLflow and its store raise, as one error that a person can act on."""
        _quiet()
        from mlflow.exceptions import MlflowException

        try:
            from sqlalchemy.exc import DBAPIError
        except ImportError:  # the controller's mlflow-skinny speaks to servers only
            DBAPIError = sqlite3.DatabaseError  # type: ignore[misc,assignment]  # noqa: N806

        try:
            yield
        except MlflowException as error:
            message = str(error).splitlines()[0]
            if "database is locked" in str(error):
                raise _store_error(sqlite3.OperationalError("database is locked"), self.uri) from error
            if message.startswith("API request to") and "failed with exception" in message:
                raise RegistryError(f"the registry's server does not answer (while {doing})", where=self.uri,
                                    next_step="see that it runs, and that the address is right") from error  # fmt: skip
            next_step = "see `endcap model list`" if "not found" in message.lower() else None
            raise RegistryError(f"{message} (while {doing})", where=self.uri, next_step=next_step) from error
        except DBAPIError as error:
            raise _store_error(getattr(error, "orig", None) or error, self._database or self.uri) from error
        except OSError as error:
            raise from_os_error(error, doing=doing) from error


def _make_store(database: Path) -> None:
    """An empty store, made beside its place and renamed, so that one killed on the way leaves nothing behind.

    MLflow's own first use runs its seventy migrations with a sync each; here nothing can be lost, so nothing is synced.
    """
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    scratch = database.with_name(f".{database.name}.{os.getpid()}")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        scratch.unlink(missing_ok=True)
        engine = sqlalchemy.create_engine(f"sqlite:///{scratch}")

        @sqlalchemy.event.listens_for(engine, "connect")
        def unsynced(connection: sqlite3.Connection, _: object) -> None:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = MEMORY")

        _initialize_tables(engine)  # type: ignore[no-untyped-call]
        engine.dispose()
        scratch.replace(database)
    except OSError as error:
        raise from_os_error(error, doing="making the registry") from error
    finally:
        scratch.unlink(missing_ok=True)


def _store_error(error: BaseException, where: object) -> RegistryError:
    text = str(error)
    if "locked" in text or "busy" in text:
        return RegistryError("the registry's store is locked by another process", where=where,
                             next_step="wait for it to end, then run the same command again")  # fmt: skip
    if "full" in text:
        return RegistryError("the registry's store cannot grow: the disk is full", where=where,
                             next_step="free some space, then run the same command again")  # fmt: skip
    return RegistryError(f"the registry's store cannot be used ({text})", where=where,
                         next_step="restore it from a backup")  # fmt: skip


def _quiet() -> None:
    """No telemetry, no chatter, no minutes of trying a server that is away: to be said before MLflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _lift(folder: Path, to: Path) -> None:
    """A server's artifacts come in a folder of their own name inside of the one that was asked for."""
    if folder.resolve() == to.resolve():
        return
    apart = to / ".coming"
    folder.rename(apart)
    for file in apart.iterdir():
        file.rename(to / file.name)
    apart.rmdir()


def _local_folder(source: str) -> Path | None:
    text = source.removeprefix("file://")
    return Path(text) if text.startswith("/") else None


def _model_version(found: Any, aliases: Mapping[str, str]) -> ModelVersion:
    tags = dict(found.tags)
    return ModelVersion(
        name=found.name,
        version=str(found.version),
        digest=tags.pop(_DIGEST_TAG, ""),
        aliases=tuple(sorted(alias for alias, version in aliases.items() if str(version) == str(found.version))),
        tags=tags,
        created_at_s=found.creation_timestamp / 1000.0,
    )
