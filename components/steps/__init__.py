"""The pipeline's steps: a plain typed function each, and thin KFP components round them."""
