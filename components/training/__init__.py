"""Training: batches, the loop, checkpoints. Plain functions over arrays; the pipeline's component wraps them."""
