"""BlockPruner: find, bypass and remove the residual blocks of a decoder LLM that it can do without.

The library. It knows torch, transformers and pydantic; it knows nothing of Prefect, DuckDB, typer or lm-eval,
reads no environment variable and chooses no path. Importing the package itself imports none of the heavy libraries.
"""

__version__ = "0.1.0"
