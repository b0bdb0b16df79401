"""Longer measurements against others. Run from the repository's root; nothing of the product imports this."""
