"""Load with feedback: open loop, exact percentiles, objectives as thresholds."""
