"""Object detection: the two-stage detector in 2D, detectors in 3D, and the scores of detection."""
