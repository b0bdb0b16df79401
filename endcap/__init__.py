"""endcap: the path from a green training run to every shopper, decided by evidence."""

__version__ = "0.1.0"
API_VERSION = "endcap.dev/v1alpha1"
