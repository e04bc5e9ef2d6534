"""Graphs of experts as files: DOT, JSON, GraphML, Mermaid, and a page to explore them in."""
