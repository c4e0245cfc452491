"""Segmentation: heads on any encoder, loss, prediction by windows, scores, predictions as NIfTI."""
