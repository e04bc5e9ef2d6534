"""Pure functions from routes and profiles to results: no model runs here, nothing is drawn."""
