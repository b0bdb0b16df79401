"""Where the data comes from: a given file, a mirror folder, the network, or (said so) a synthetic shop."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from components.data.dataset import Dataset, parse_sequences
from components.data.synthetic import Shop, synthetic_dataset
from endcap.errors import DataError, from_os_error

__all__ = ["BEAUTY", "KNOWN_DATA", "MIRROR_VARIABLE", "KnownData", "Obtained", "Source", "obtain"]

MIRROR_VARIABLE = "ENDCAP_DATA_MIRROR"
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class KnownData:
    """Published data with a fixed checksum."""

    name: str
    file: str
    url: str
    sha256: str
    licence: str
    caveat: str


BEAUTY = KnownData(
    name="beauty",
    file="Beauty.txt",
    url="https://raw.githubusercontent.com/salesforce/ICLRec/2890e6c3ff6a22c6699fc19cb863b66786c1cde4/data/Beauty.txt",
    sha256="226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
    licence="BSD-3-Clause (repository salesforce/ICLRec)",
    caveat="Purchases of the same day stand in the order of their item ids, which leaks some information on the order.",
)
"""Amazon Beauty, 5-core, as prepared by ICLRec: 22,363 shoppers, 12,101 items, 198,502 purchases."""
KNOWN_DATA = (BEAUTY.name, SYNTHETIC)
"""What may be asked for by name."""


@dataclass(frozen=True)
class Source:
    """What data is wanted.

    Attributes:
        file: a file of ``user item item ...`` lines; None for published data.
        sha256: what the given file must have; None to accept it as it is (its checksum is recorded).
        name: ``beauty`` or ``synthetic`` where no file is given.
        shop: size of the synthetic shop.
        seed: of the synthetic shop.
        mirror: a folder holding published data; None: the variable ``ENDCAP_DATA_MIRROR``.
        cache: where downloads are kept; None: the user's cache folder.
    """

    file: Path | None = None
    sha256: str | None = None
    name: str = BEAUTY.name
    shop: Shop = field(default_factory=Shop)
    seed: int = 7
    mirror: Path | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Obtained:
    """A data set and, for people, where it came from (and why it is synthetic, where it is)."""

    dataset: Dataset
    origin: str


def obtain(source: Source) -> Obtained:
    """Get and parse the data. Only where published data can be had nowhere does the synthetic shop take its place.

    Raises:
        DataError: a file that is missing, of another checksum, or of the wrong form. Never answered by other data.
    """
    if source.file is not None:
        raw = _read(source.file)
        if source.sha256 is not None:
            _check(raw, source.sha256, source.file)
        return Obtained(_parse(raw, source.file.stem, source.file), str(source.file))
    if source.name == SYNTHETIC:
        return Obtained(synthetic_dataset(source.shop, source.seed), "synthetic shop, as asked for")
    if source.name != BEAUTY.name:
        raise DataError(f"no data set is called {source.name!r}", next_step=f"known: {', '.join(KNOWN_DATA)}")
    return _published(BEAUTY, source)


def _published(known: KnownData, source: Source) -> Obtained:
    mirrored = _mirrored(known, source.mirror)
    if mirrored is not None:
        raw = _read(mirrored)
        _check(raw, known.sha256, mirrored)
        return Obtained(_parse(raw, known.name, mirrored), str(mirrored))
    try:
        path = _download(known, source.cache)
    except _UnreachableError as error:
        return Obtained(synthetic_dataset(source.shop, source.seed),
                        f"synthetic shop, because {known.name} could not be fetched ({error})")  # fmt: skip
    return Obtained(_parse(_read(path), known.name, path), known.url)


def _parse(raw: bytes, name: str, where: Path) -> Dataset:
    """A data set with what is known of it, by its checksum, under whatever name it comes."""
    dataset = parse_sequences(raw, name=name, where=where)
    return replace(dataset, caveats=(BEAUTY.caveat,)) if dataset.sha256 == BEAUTY.sha256 else dataset


def _mirrored(known: KnownData, mirror: Path | None) -> Path | None:
    folder = mirror or (Path(text) if (text := os.environ.get(MIRROR_VARIABLE)) else None)
    if folder is None:
        return None
    if not folder.is_dir():
        raise DataError("the data mirror is not a folder", where=folder,
                        next_step=f"correct or unset {MIRROR_VARIABLE}")  # fmt: skip
    for path in (folder / known.name / known.file, folder / known.file):
        if path.exists():
            return path
    return None


class _UnreachableError(Exception):
    """Neither the network nor the cache has the file."""


def _download(known: KnownData, cache: Path | None) -> Path:
    """The file in the cache, fetched first where it is not there or damaged.

    Pooch writes to a temporary file and renames it, and compares the checksum before that.
    """
    import pooch  # type: ignore[import-untyped]
    import requests  # type: ignore[import-untyped]

    pooch.get_logger().setLevel(logging.WARNING)
    folder = cache or Path(pooch.os_cache("endcap"))
    store = pooch.create(path=folder, base_url="", registry={known.file: f"sha256:{known.sha256}"},
                         urls={known.file: known.url}, retry_if_failed=1)  # fmt: skip
    try:
        return Path(store.fetch(known.file, downloader=pooch.HTTPDownloader(timeout=(3.0, 10.0))))
    except (requests.RequestException, TimeoutError) as error:
        cached = folder / known.file
        if cached.exists():
            _check(_read(cached), known.sha256, cached)
        raise _UnreachableError(type(error).__name__) from error
    except ValueError as error:
        raise DataError("the download does not have the expected SHA-256", where=known.url,
                        next_step=f"put the right file into a folder, {MIRROR_VARIABLE}=it") from error  # fmt: skip
    except OSError as error:
        raise from_os_error(error, doing=f"keeping {known.file} in {folder}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such data file", where=path) from error
    except OSError as error:
        raise DataError(f"the data file cannot be read ({error.strerror})", where=path) from error


def _check(raw: bytes, expected: str, where: Path) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != expected.lower():
        raise DataError(f"SHA-256 is {found}, expected {expected.lower()}: the file is damaged or another one",
                        where=where, next_step="get it again, or give the checksum of the one you mean")  # fmt: skip
