"""Arrays and a JSON document in one ``.npz`` file, written whole or not at all, read without pickle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endcap.errors import StateError
from endcap.files import write_atomic

__all__ = ["read_arrays", "write_arrays"]

_ABOUT = "about_json"


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Write ``arrays`` and the JSON document ``about`` to ``path``.

    Raises:
        StorageError: no space, or not allowed.
    """
    buffer = io.BytesIO()
    entries = {**arrays, _ABOUT: np.array(json.dumps(about, allow_nan=False))}
    np.savez(buffer, **entries)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and the document of :func:`write_arrays`.

    Raises:
        StateError: missing or damaged; the message names the file.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(str(arrays.pop(_ABOUT)))
    except FileNotFoundError as error:
        raise StateError("the file is missing", where=path) from error
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise StateError(f"damaged ({error})", where=path, next_step="run the pipeline again") from error
