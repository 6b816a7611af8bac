"""How a run is asked for: recipe and launch config."""
