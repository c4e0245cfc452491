"""Encoders and kept models as files that other programs open without ssl3d."""
