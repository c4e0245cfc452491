"""Scans and images to an HDF5 store, and from there to crops."""
