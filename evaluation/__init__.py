"""Predictions, metrics, intervals, leaderboard files."""
