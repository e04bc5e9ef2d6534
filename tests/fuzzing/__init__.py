"""Damaged files, made from good ones, and what must happen when a program opens them.

`mutations` damages JSON and bytes, `files` makes the good ones, `targets` opens the damaged ones
through the public entry points, `sandbox` judges what came of it.
"""
