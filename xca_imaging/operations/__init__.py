"""Health and metrics: they read what the node knows and are never called by the core."""
