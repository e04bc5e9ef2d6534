"""What a smaller model is to be: plain values, read from and written to plan.json."""
