"""The feedback collector: durable, append-only, once per impression. Started by ``python -m serving.feedback``."""
