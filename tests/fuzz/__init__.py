"""The model server under requests that mean no good: see ``python -m tests.fuzz --help``."""
