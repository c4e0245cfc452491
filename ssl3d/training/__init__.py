"""Pretraining: options, the loop, run folders, loading of batches."""
