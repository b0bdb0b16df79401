"""Rollouts decided by evidence: what is declared, where it stands, pure decisions, and the loop round them."""
