"""Names and layout of tensors as Hugging Face transformers has them, for ``--format hf``."""
