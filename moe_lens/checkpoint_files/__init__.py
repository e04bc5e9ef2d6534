"""The files of a model folder, read and judged before anything is built from them."""
