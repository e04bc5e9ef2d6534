"""Pictures of results: for the terminal (rich) and for files (matplotlib)."""
