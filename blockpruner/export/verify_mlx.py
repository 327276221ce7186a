"""The gate of exports that MLX-LM reads: the one of all exports, and MLX-LM's own logits where it is installed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from blockpruner.export.verify import Loading, Verification, ask, compare, verify
from blockpruner.loading import DtypeName

_FRESH_MLX = Path(__file__).with_name("fresh_mlx.py")


def is_installed() -> bool:
    """Whether there is MLX-LM and, which its Linux package does not bring along, MLX itself."""
    return all(find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def verify_with_mlx_lm(
    export_dir: Path, request: dict[str, Tensor], expected: dict[str, Tensor], loading: Loading
) -> Verification:
    """Load the export in fresh processes, with transformers and then with MLX-LM, and compare both.

    Raises:
        ExportError: if a fresh process cannot load or run it.
    """
    with_transformers = verify(export_dir, request, expected, loading)
    if not with_transformers.passed or not is_installed():
        return with_transformers
    with_mlx = replace(_compare_mlx(export_dir, request, expected, loading.dtype), engine="mlx-lm")
    if not with_mlx.passed:
        return with_mlx
    larger = max(with_transformers, with_mlx, key=lambda result: result.max_logit_difference)
    return replace(larger, engine=f"{with_transformers.engine}, {with_mlx.engine}")


def _compare_mlx(
    export_dir: Path, request: dict[str, Tensor], expected: dict[str, Tensor], dtype: DtypeName
) -> Verification:
    """The plain batch only, for MLX-LM knows no padding; at once, and again through its cache."""
    answer = ask(_FRESH_MLX, export_dir, {"plain_ids": request["plain_ids"]}, "--dtype", dtype)
    return compare(answer, dict.fromkeys(("plain_logits", "cached_logits"), expected["plain_logits"]), dtype)
