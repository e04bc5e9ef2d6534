"""Experts across layers: which follow which, which do the same work, and the way a label takes."""

from .find import pipeline
from .graph import pipeline_graph
from .result import Pipeline

__all__ = ["Pipeline", "pipeline", "pipeline_graph"]
