"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Other tests share the machine: a slow example is no failure.
settings.register_profile("endcap", deadline=None)
settings.load_profile("endcap")
