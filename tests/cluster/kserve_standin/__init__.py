"""A stand-in for KServe's controller in Standard mode, for where the real one cannot be had. It is not KServe.

It does what the real one (of 2026-08) does with an InferenceService behind the Gateway API, refusals, arithmetic, order
and gaps included; the tests that run on it run on the real one too. One that is kinder than the real one is a defect.
"""
