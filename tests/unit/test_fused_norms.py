"""RMS norms as one kernel: the scores stay, and what is no RMS norm stays too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.scoring import fused_norms, kernels
from blockpruner.scoring.decoder import run_layer
from blockpruner.scoring.fused_norms import FusedNorms, FusedRMSNorm, with_fused_norms
from tests.scorers import filled, plain_scorer, row_of, sweep_scorer
from tests.tiny_models import TINY_FAMILIES, tiny_model, tiny_token_ids

WIDTH = 44
"""Seven waves of a sine: their mean is almost zero."""


def names_of_fused(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, FusedRMSNorm)]


def names_of_rms_norms(module: nn.Module) -> list[str]:
    """By their class; Gemma's multiply by one more than the weight."""
    classes = {name: type(child).__name__ for name, child in module.named_modules()}
    return [name for name, of in classes.items() if of.endswith("RMSNorm") and not of.startswith("Gemma")]


def gone_with(model: PreTrainedModel, blocks: tuple[Block, ...]) -> set[nn.Parameter]:
    """The weights that serve removed blocks alone."""
    row, layers = row_of(model), row_of(model).decoder_layers(model)
    names = [(layers[block.layer_index], name) for block in blocks for name in row.block(block.block_kind).modules]
    return {weight for layer, name in names for weight in layer.get_submodule(name).parameters()}


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_the_scores_of_every_family_stay(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(family), tiny_token_ids(3, 12, seed=2)
    gone = (mha(1), mlp(2))
    candidates = [block for block in all_blocks(model.config.num_hidden_layers) if block not in gone]
    expected = filled(plain_scorer(model, tokens), gone, candidates)
    before = {name: type(module) for name, module in model.named_modules()}
    forward, ran = FusedRMSNorm.forward, set()

    def watched(fused: FusedRMSNorm, hidden_states: Tensor) -> Tensor:
        ran.add(fused.weight)
        return forward(fused, hidden_states)

    monkeypatch.setattr(FusedRMSNorm, "forward", watched)
    monkeypatch.setattr(kernels, "uncompiled", lambda _: FusedNorms())
    table = filled(sweep_scorer(model, tokens), gone, candidates)
    torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)
    assert ran == {model.get_submodule(name).weight for name in names_of_rms_norms(model)} - gone_with(model, gone)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_every_rms_norm_of_a_layer_is_found_and_nothing_else(family: str) -> None:
    layer = row_of(tiny_model(family)).decoder_layers(tiny_model(family))[1]
    assert names_of_fused(with_fused_norms(layer)) == names_of_rms_norms(layer)
    assert names_of_fused(layer) == []


class Centred(LlamaRMSNorm):
    """A layer norm under another name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OneMore(LlamaRMSNorm):
    """As Gemma's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1.0 + self.weight) / self.weight


class OtherEps(LlamaRMSNorm):
    """Not the one that it names."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, 4 * self.variance_epsilon)


class Gated(LlamaRMSNorm):
    """Takes a second input."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states) * gate


class Flat(LlamaRMSNorm):
    """Wants tokens without sequences."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        num_tokens, width = hidden_states.shape
        return super().forward(hidden_states).view(num_tokens, width)


class Wide(LlamaRMSNorm):
    """Gives float32 whatever it gets."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.float()).float()


class SometimesGated(LlamaRMSNorm):
    """Takes a second input where there is one, as state-space layers' norms do."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        result = super().forward(hidden_states)
        return result if gate is None else result * gate


class Biased(LlamaRMSNorm):
    """Has a second parameter, which happens to do nothing now."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class Pair(LlamaRMSNorm):
    """Gives more than the norm."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


def hooked() -> nn.Module:
    norm = LlamaRMSNorm(WIDTH)
    norm.register_forward_hook(lambda *_: None)
    return norm


def hooked_before() -> nn.Module:
    norm = LlamaRMSNorm(WIDTH)
    norm.register_forward_pre_hook(lambda *_: None)
    return norm


def with_a_forward_of_its_own() -> nn.Module:
    """As accelerate gives it, which fetches weights there."""
    norm = LlamaRMSNorm(WIDTH)
    norm.forward = lambda hidden: LlamaRMSNorm.forward(norm, hidden)
    return norm


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Centred(WIDTH),
        lambda: OneMore(WIDTH),
        lambda: OtherEps(WIDTH),
        lambda: Gated(WIDTH),
        lambda: SometimesGated(WIDTH),
        lambda: Flat(WIDTH),
        Biased,
        lambda: Pair(WIDTH),
        hooked,
        hooked_before,
        with_a_forward_of_its_own,
        lambda: nn.LayerNorm(WIDTH, bias=False),
        lambda: nn.Linear(WIDTH, WIDTH),
    ],
)
def test_what_is_no_plain_rms_norm_stays(make: Callable[[], nn.Module], dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(make(), LlamaRMSNorm(WIDTH)).to(dtype)
    for parameter in module.parameters():
        if parameter.any():
            nn.init.uniform_(parameter, 0.5 * scale, 1.5 * scale)
    assert names_of_fused(with_fused_norms(module)) == ["1"]
    assert with_fused_norms(module[0]) is module[0]


def test_a_norm_that_widens_its_input_stays() -> None:
    assert isinstance(with_fused_norms(Wide(WIDTH)), FusedRMSNorm)
    norm = Wide(WIDTH).bfloat16()
    assert with_fused_norms(norm) is norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_norm_gives_the_norms_result_in_the_norms_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(WIDTH, eps=1e-5).to(torch.bfloat16)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    fused = with_fused_norms(norm)
    assert isinstance(fused, FusedRMSNorm)
    hidden_MD = torch.randn(7, WIDTH).to(dtype)
    result_MD = fused(hidden_MD)
    torch.testing.assert_close(result_MD, norm(hidden_MD))
    norm.weight.data = norm.weight.data * 2.0  # as where a layer's weights are fetched to another place
    torch.testing.assert_close(fused(hidden_MD), 2.0 * result_MD)


def test_one_weight_for_all_is_left_to_the_norm() -> None:
    norm = LlamaRMSNorm(1)
    hidden_MD = torch.randn(7, WIDTH)
    torch.testing.assert_close(with_fused_norms(norm)(hidden_MD), norm(hidden_MD))


class NamedEps(nn.Module):
    """Names its constant as most libraries do, and gives back the dtype that it got."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(
            hidden_states
        )


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_a_norm_in_another_dtype_than_the_stream_gives_the_streams(eps: float) -> None:
    norm = NamedEps(eps)
    fused = with_fused_norms(norm)
    assert isinstance(fused, FusedRMSNorm)
    hidden_MD = 0.01 * torch.randn(5, WIDTH)
    torch.testing.assert_close(fused(hidden_MD), norm(hidden_MD))
    assert torch.equal(fused(hidden_MD.bfloat16()), norm(hidden_MD.bfloat16()))


def test_a_norm_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[nn.Module] = []

    def looking(module: nn.Module) -> nn.Module:
        looked.append(module)
        return with_fused_norms(module)

    monkeypatch.setattr(fused_norms, "with_fused_norms", looking)
    run, norms = FusedNorms(), [LlamaRMSNorm(WIDTH) for _ in range(2)]
    for norm in norms * 3:
        run(norm, torch.randn(5, WIDTH), (), {})
    assert looked == norms


def test_norms_are_fused_on_a_gpu_alone() -> None:
    assert kernels.uncompiled(torch.device("cpu")) is run_layer
    assert isinstance(kernels.uncompiled(torch.device("cuda", 1)), FusedNorms)
