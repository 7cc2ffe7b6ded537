"""The web page and the JSON API; they parse, call the estimator, and render."""
