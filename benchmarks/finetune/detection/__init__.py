"""Fine-tuning for detection: boxes around objects."""
