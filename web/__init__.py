"""The page and the JSON API: they parse, call the estimator and render; no default is set here."""
