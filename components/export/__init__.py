"""From a PyTorch graph to ONNX files: export, parity, compression, and what a graph recommends.

Only :mod:`components.export.graph` needs PyTorch; the others stand on ONNX Runtime alone.
"""
