"""Where along the body unseen volumes lie, by a sorting run."""
