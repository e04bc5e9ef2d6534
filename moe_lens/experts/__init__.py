"""What the experts of a loaded model are: their weights, channels, and answers to one text."""
