"""How a benchmark's command ends: an error in one line with its exit code, 130 when it was interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from endcap.errors import EndcapError

__all__ = ["ending"]


@contextmanager
def ending() -> Iterator[None]:
    """Around all that a benchmark's command does."""
    try:
        yield
    except EndcapError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
