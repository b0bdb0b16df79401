"""The operator: rollouts as objects of a Kubernetes cluster, driven by the same engine as on a laptop."""
