"""A training run that exists: the request document that describes it, read off its live parts."""
