"""The recommenders: bestsellers, item-kNN and a causal transformer, each exportable as one graph.

Items are indices 1..n_items, 0 is padding; a history is an ``int32`` array, oldest first.
"""
