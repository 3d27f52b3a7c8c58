"""A run's folder: settings, events, metrics, checkpoints, manifest and report."""
