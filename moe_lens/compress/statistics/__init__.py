"""What is known of each expert from sums over tokens, and what follows from the sums alone."""
