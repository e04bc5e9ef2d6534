"""What a smaller model lost, on text that had no part in making it."""
