"""How alike the experts of a layer are: by weights, by outputs, by routing."""
