"""The main job, end to end, on one machine."""

from endcap.cli.demo.command import demo

__all__ = ["demo"]
