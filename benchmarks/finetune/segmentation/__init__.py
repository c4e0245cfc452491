"""Fine-tuning for segmentation: every voxel gets a class."""
