"""The addresses of a full cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Net:
    """The addresses of one cluster; ``second`` is the second byte of all of them."""

    second: int

    @property
    def machine(self) -> str:
        return f"10.{self.second}.0.1"

    @property
    def node(self) -> str:
        return f"10.{self.second}.0.2"

    @property
    def pods(self) -> str:
        return f"10.{self.second}.16.0/20"

    @property
    def pods_gateway(self) -> str:
        return f"10.{self.second}.16.1"

    @property
    def fake_pods(self) -> str:
        return f"10.{self.second}.32.1/20"

    @property
    def services(self) -> str:
        return f"10.{self.second}.64.0/20"

    @property
    def dns(self) -> str:
        return f"10.{self.second}.64.10"

    @property
    def all(self) -> str:
        return f"10.{self.second}.0.0/16"

    @property
    def interface(self) -> str:
        """This machine's end of the cable."""
        return f"endcap{self.second}"
