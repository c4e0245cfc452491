"""Records of scores, statistics over them, and the check for leaks."""
