"""The cacheable units of work, one module a stage, and the places where their results live.

Stages never import each other, and know neither Prefect nor the command line.
"""
