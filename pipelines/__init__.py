"""Kubeflow pipelines made of components: run here, compile, submit, schedule."""
