"""A thousand rollouts in one operator, and in Argo Rollouts, on the same API server at the same cadence."""
