"""How far apart two candidates' scores must lie to be told apart."""

from __future__ import annotations

import pytest

from blockpruner.loading import DtypeName
from blockpruner.scoring.noise import noise_nats
from tests.tiny_models import TINY_FAMILIES, tiny_model

MIXTURES = {"mixtral", "mixtral-window", "qwen2_moe", "qwen2_moe-mixed", "qwen3_moe"}


@pytest.mark.parametrize(("dtype", "dense", "mixture"), [("float32", 1e-5, 1e-5), ("bfloat16", 2e-3, 1e-2)])
def test_a_mixture_of_experts_is_noisier_in_bfloat16(dtype: DtypeName, dense: float, mixture: float) -> None:
    found = {family: noise_nats(tiny_model(family), dtype) for family in TINY_FAMILIES}
    assert found == {family: mixture if family in MIXTURES else dense for family in TINY_FAMILIES}
    assert set(found) >= MIXTURES
