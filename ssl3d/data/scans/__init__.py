"""Scans as people keep them: finding, listing, reading."""
