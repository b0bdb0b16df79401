"""The model server beside KServe's, MLServer and onnxruntime itself: see ``__main__``."""
