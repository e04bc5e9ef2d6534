"""Training the router rows of a smaller model towards its parent."""
