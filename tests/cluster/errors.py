"""What goes wrong with the test cluster."""

from __future__ import annotations


class ClusterError(Exception):
    """Says what happened, where, and what to do next."""
