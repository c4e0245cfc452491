"""Predictions of kept models: scans prepared as the training data were, ensembles, files for others."""
