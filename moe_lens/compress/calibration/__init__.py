"""Reading the calibration text with the model, once, and what must hold for it."""
