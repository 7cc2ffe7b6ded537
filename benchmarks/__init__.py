"""Measurements of the estimator itself: how right it is, and how fast."""
