"""The folder that stock mlx-lm opens: config.json, safetensors, and the model in memory."""
