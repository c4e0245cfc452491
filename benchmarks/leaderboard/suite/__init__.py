"""Suites: what a leaderboard run consists of, planned as jobs and run by any number of workers."""
