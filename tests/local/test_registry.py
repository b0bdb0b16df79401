"""What a user relies on: a registered package comes back bit for bit, and a store in trouble is one clear error."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from endcap import registry as registry_module
from endcap import storage_initializer
from endcap.errors import InputError, RegistryError, VerificationError
from endcap.package import verify_package
from endcap.registry import Registry, sqlite_uri
from tests.packages import ITEMS, make_package

# SQLAlchemy says this of MLflow's own mappings.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
NAME = "recommender"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A registry with two versions; the first is the champion."""
    folder = tmp_path_factory.mktemp("registry")
    registry = Registry(sqlite_uri(folder / "mlflow"))
    packages = [make_package(folder / name, items=ITEMS[skip:]) for skip, name in enumerate(("one", "two"))]
    for package in packages:
        made = registry.register(package, name=NAME, metrics={"ndcg_at_10": 0.05}, params={"epochs": 3},
                                 tags={"data_sha256": "ab", "git_commit": "cd"}, run_name="run-1")  # fmt: skip
        if made.version == "1":
            registry.set_champion(NAME, "1")
    return folder, registry, packages


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_package_comes_back_bit_for_bit_and_verifies(shop, tmp_path):
    folder, registry, packages = shop
    for version, package in enumerate(packages, 1):
        here = registry.resolve(f"models:/{NAME}/{version}")
        copy = registry.resolve(f"models:/{NAME}/{version}", destination=tmp_path / f"copy-{version}")
        assert contents(here.package) == contents(copy.package) == contents(package)
        assert here.digest == copy.digest and here.version == str(version)
        verify_package(copy.package, folder / "keys" / "signing.pub")


def test_versions_aliases_and_lineage_are_kept(shop):
    _, registry, _ = shop
    newest, oldest = registry.versions(NAME)
    assert (newest.version, newest.aliases) == ("2", ("candidate",))
    assert (oldest.version, oldest.aliases) == ("1", ("champion",))
    assert oldest.tags == {"data_sha256": "ab", "git_commit": "cd"}
    assert registry.champion(NAME) == oldest
    assert registry.resolve(f"models:/{NAME}@champion").version == "1"
    assert registry.champion("another") is None and registry.versions("another") == []


@pytest.mark.parametrize("reference", [f"models:/{NAME}/99", f"models:/{NAME}@nobody", "models:/another/1"])
def test_an_unknown_version_is_a_registry_error(shop, reference):
    with pytest.raises(RegistryError) as unknown:
        shop[1].resolve(reference)
    assert "Traceback" not in str(unknown.value)
    with pytest.raises(RegistryError):
        shop[1].set_champion(NAME, "99")


@pytest.mark.parametrize("reference", ["recommender/1", "models:/../1", "models:/recommender", "models:/r/one"])
def test_a_malformed_reference_is_an_input_error(shop, reference):
    with pytest.raises(InputError):
        shop[1].resolve(reference)


def test_a_package_changed_in_the_store_is_not_handed_out(shop, tmp_path):
    registry = shop[1]
    made = registry.register(make_package(tmp_path / "three"), name="third", metrics={}, params={}, tags={})
    stored = registry.resolve(f"models:/third/{made.version}").package
    (stored / "package.json").write_bytes((stored / "package.json").read_bytes() + b" ")
    with pytest.raises(RegistryError, match="not the one that was registered"):
        registry.resolve(f"models:/third/{made.version}")
    (stored / "package.json").unlink()
    with pytest.raises(RegistryError, match="gone"):
        registry.resolve(f"models:/third/{made.version}")


def test_a_package_that_is_not_what_its_manifest_says_is_not_registered(shop, tmp_path):
    package = make_package(tmp_path / "bad")
    (package / "items.json").write_text("[]")
    with pytest.raises(VerificationError):
        shop[1].register(package, name="bad", metrics={}, params={}, tags={})
    assert shop[1].versions("bad") == []


def test_a_missing_store_is_said_and_not_made_by_reading(tmp_path):
    registry = Registry(sqlite_uri(tmp_path / "nowhere"))
    assert registry.champion(NAME) is None and not registry.exists()
    with pytest.raises(RegistryError, match="store is missing"):
        registry.resolve(f"models:/{NAME}/1")
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_store_is_not_taken_for_a_new_registry(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(RegistryError, match="empty"):
        Registry(sqlite_uri(tmp_path)).versions("recommender")


def test_a_damaged_store_is_said(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database at all, however long it may be" * 100)
    with pytest.raises(RegistryError, match="cannot be used"):
        Registry(sqlite_uri(tmp_path)).resolve(f"models:/{NAME}/1")


def test_a_locked_store_is_said_and_usable_again_after(shop, monkeypatch, tmp_path):
    folder, registry, _ = shop
    monkeypatch.setattr(registry_module, "_LOCK_WAIT_S", 0.05)
    with closing(sqlite3.connect(folder / "mlflow" / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryError, match="locked"):
            registry.resolve(f"models:/{NAME}/1")
        with pytest.raises(RegistryError, match="locked"):
            registry.register(make_package(tmp_path / "p"), name=NAME, metrics={}, params={}, tags={})
        other.execute("ROLLBACK")
    assert registry.resolve(f"models:/{NAME}/1").version == "1"


def test_a_server_that_does_not_answer_is_said_within_seconds():
    started_s = time.monotonic()
    with pytest.raises(RegistryError, match=r"^http://127\.0\.0\.1:9: the registry's server does not answer"):
        Registry("http://127.0.0.1:9").versions("shop")
    assert time.monotonic() - started_s < 45


def test_what_is_no_uri_of_a_registry_is_refused():
    with pytest.raises(InputError, match="names no registry"):
        Registry("/some/folder")


# ---- as KServe's storage initializer -------------------------------------------------------------------------------


def test_the_storage_initializer_fills_a_mounted_folder(shop, tmp_path, monkeypatch, capsys):
    _, registry, packages = shop
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    models = tmp_path / "models"
    (models / ".coming-before" / "package").mkdir(parents=True)
    (models / "half.onnx").write_bytes(b"of a start that was killed")
    mounted = models.stat().st_ino
    assert storage_initializer.main([f"mlflow://{NAME}/2", str(models)]) == 0
    assert contents(models) == contents(packages[1]) and models.stat().st_ino == mounted
    assert "version 2" in capsys.readouterr().err
    assert storage_initializer.main([f"mlflow://{NAME}/@champion", str(models)]) == 0
    assert contents(models) == contents(packages[0])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["mlflow://recommender/99"], 1, "99"), (["mlflow://../1"], 2, "no model version"), (["s3://bucket/1"], 2, "s3"),
     (["mlflow://recommender/1/../2"], 2, "no model version"), ([], 2, "two arguments")],
)  # fmt: skip
def test_the_storage_initializer_says_what_is_wrong(shop, tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shop[1].uri)
    models = tmp_path / "models"
    assert storage_initializer.main([*arguments, str(models)]) == code
    assert said in capsys.readouterr().err
    assert not models.exists() or not contents(models)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert storage_initializer.main([f"mlflow://{NAME}/1", str(models)]) == 2
    assert "MLFLOW_TRACKING_URI" in capsys.readouterr().err
