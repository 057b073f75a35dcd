"""Makes the templates and blueprints: their graphs, and their pictures at the graphs' own settings."""
