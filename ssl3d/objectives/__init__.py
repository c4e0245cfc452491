"""Losses and targets of the proxies."""
