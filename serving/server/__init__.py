"""The model server: one process, one replica, one signed package. Started by ``python -m serving.server``."""
