"""Packages of text: encoders and rankers made of a pretrained model, and how good they are on judged queries.

Only :mod:`components.text.models` needs PyTorch and transformers.
"""
