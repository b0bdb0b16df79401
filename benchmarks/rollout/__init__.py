"""Rollouts decided by evidence, measured: false rollbacks, detection, cost; beside what others do."""
