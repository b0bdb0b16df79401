"""What one pipeline step does: plain typed functions and models, with a thin Kubeflow component round each."""
