"""`ssl3d study`: whether pretraining pays on scans at hand, planned as a suite within the hours given."""
