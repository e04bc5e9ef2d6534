"""Prompts to run a model on: read from files, tokenised, put into batches."""

from .files import read_corpus
from .prompts import Corpus, Prompt

__all__ = ["Corpus", "Prompt", "read_corpus"]
