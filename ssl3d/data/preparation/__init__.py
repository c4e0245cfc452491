"""From scans to a store: what `ssl3d prepare` does."""
