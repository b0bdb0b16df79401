"""Drills: Chaos Toolkit experiments, their actions, probes and controls."""
