"""Prometheus' own tool, as Debian packages it with the server."""

from __future__ import annotations

import os
import shutil

import pytest


def promtool() -> str:
    """Its path; where there is none the test is skipped, in CI failed."""
    found = shutil.which("promtool")
    if found is None:
        reason = "needs promtool (Debian's prometheus)"
        if os.environ.get("CI", "").lower() in {"1", "true", "yes"}:
            pytest.fail(f"in CI this must run: {reason}", pytrace=False)
        pytest.skip(reason)
    return found
