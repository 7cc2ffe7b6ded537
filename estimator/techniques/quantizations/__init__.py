"""How frozen base weights are stored: one file for each format."""
