"""Crops and batched augmentations, on the device."""
