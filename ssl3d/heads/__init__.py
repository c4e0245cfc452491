"""Modules on top of an encoder: projections, decoders, the slice aggregator."""
