"""Exports: what is written computes what the masked original computes, wherever and however it is loaded.

Every family and every awkward set of removed blocks is written once and answered by one fresh process, which runs the
program of `verify` for each; the masked original and hand-written forwards say what the answers must be.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.errors import ExportError
from blockpruner.export import fresh_load
from blockpruner.export.verify import Loading, compare, verification_request, verify
from blockpruner.export.write import WrittenExport
from blockpruner.masking import masked
from tests.integration.export_lab import (
    NUM_NEW,
    PROMPTS,
    REMOVED,
    REQUEST,
    Source,
    every_case,
    generate,
    greedy,
    load,
    logits,
)
from tests.tiny_models import tiny_token_ids

# --- the same logits --------------------------------------------------------------------------------------------------


@every_case
def test_a_fresh_process_answers_as_the_masked_original(
    sources: dict[str, Source], answers: dict[tuple[str, str], dict[str, Tensor]], family: str, case: str
) -> None:
    """On a plain batch, and on a left-padded one decoded token by token with the cache."""
    expected = sources[family].masked_logits(REMOVED[case])
    answer = answers[family, case]
    assert answer.keys() == expected.keys()
    for name, tensor in expected.items():
        assert answer[name].shape == tensor.shape
        assert (answer[name] - tensor).abs().max() <= 1e-5, name


@every_case
def test_a_fresh_process_answers_as_the_hand_written_forward(
    sources: dict[str, Source], answers: dict[tuple[str, str], dict[str, Tensor]], family: str, case: str
) -> None:
    """Padding included: what comes after a prompt does not depend on the pads before it."""
    answer = answers[family, case]
    plain = sources[family].oracle_logits(REMOVED[case], REQUEST["plain_ids"])
    assert (answer["plain_logits"] - plain).abs().max() <= 2e-5
    ids = torch.cat([REQUEST["padded_ids"], REQUEST["decode_ids"]], dim=1)
    num_answers = REQUEST["decode_ids"].shape[1] + 1
    for row, pads in enumerate((REQUEST["padded_mask"] == 0).sum(dim=1).tolist()):
        alone = sources[family].oracle_logits(REMOVED[case], ids[row : row + 1, pads:])[0, -num_answers:]
        assert (answer["cached_logits"][row] - alone).abs().max() <= 2e-5


@every_case
def test_generation_from_a_left_padded_batch_equals_generation_without_cache_or_padding(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    generated = generate(loaded(family, case), PROMPTS)
    assert generated == [greedy(sources[family], REMOVED[case], prompt, NUM_NEW) for prompt in PROMPTS]


# --- everything else that is done with a model ------------------------------------------------------------------------

LEADING = "all attentions but one"
"""The layout that is farthest from a stock one: feed-forwards before and after the only attention."""
ODD_CASES = [
    ("llama", "first attention"),
    ("gemma", LEADING),
    ("gemma2", "first attention"),
    ("gemma3_text", LEADING),
    ("qwen2-mixed-windows", "first attention"),
    ("mistral-window", LEADING),
]
odd_cases = pytest.mark.parametrize(("family", "case"), ODD_CASES)


@odd_cases
def test_a_static_cache_generates_the_same(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str
) -> None:
    model = load(exports[family, case].path)
    generated = generate(model, PROMPTS, cache_implementation="static", disable_compile=True)
    assert generated == [greedy(sources[family], REMOVED[case], prompt, NUM_NEW) for prompt in PROMPTS]


@odd_cases
def test_beams_generate_the_same(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str
) -> None:
    """Against the masked original's beams without a cache; other than greedy, so that beams are seen to work."""
    source = sources[family]
    with masked(source.architecture, source.model, REMOVED[case]):
        expected = generate(source.model, PROMPTS, num_beams=4, use_cache=False)
    generated = generate(load(exports[family, case].path), PROMPTS, num_beams=4)
    assert generated == expected
    assert generated != [greedy(source, REMOVED[case], prompt, NUM_NEW) for prompt in PROMPTS]


def test_prompt_lookup_generates_the_same(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport]
) -> None:
    """It feeds several tokens at once and takes some back from the cache."""
    prompt = PROMPTS[1] * 3
    model = load(exports["llama", "first attention"].path)
    generated = generate(model, [prompt], prompt_lookup_num_tokens=4)
    assert generated == [greedy(sources["llama"], REMOVED["first attention"], prompt, NUM_NEW)]


@pytest.mark.parametrize(("family", "case"), [("llama", "first attention"), ("gemma3_text", LEADING)])
@pytest.mark.parametrize("role", ["assisted", "assistant"])
def test_assisted_decoding_generates_the_same(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str, role: str
) -> None:
    """With the dense model on the other side; tokens are taken back from the caches of both."""
    source, pruned = sources[family], load(exports[family, case].path)
    prompt, dense = PROMPTS[0], source.model
    if role == "assisted":
        assert generate(pruned, [prompt], assistant=dense) == [greedy(source, REMOVED[case], prompt, NUM_NEW)]
    else:
        assert generate(dense, [prompt], assistant=pruned) == [greedy(source, (), prompt, NUM_NEW)]


def test_a_prompt_fed_in_chunks_gives_the_same_logits(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport]
) -> None:
    model, ids = load(exports["llama", "first attention"].path), tiny_token_ids(2, 15, seed=8)
    with torch.inference_mode():
        first = model(input_ids=ids[:, :6], use_cache=True)
        second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    expected = sources["llama"].oracle_logits(REMOVED["first attention"], ids)
    assert (torch.cat([first.logits, second.logits], dim=1) - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(exports: dict[tuple[str, str], WrittenExport], checkpointing: bool) -> None:
    model = load(exports["qwen2", LEADING].path)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    calls: list[object] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    ids = tiny_token_ids(2, 12)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) == (2 if checkpointing else 1), "checkpointing computes a layer again on the way back"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_hidden_states_and_attentions_are_one_a_layer(exports: dict[tuple[str, str], WrittenExport]) -> None:
    model = load(exports["llama", "feed-forwards in a row"].path, attn_implementation="eager")
    output = model(input_ids=tiny_token_ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 7, 32)] * 3
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 4, 7, 7)] * 2


@pytest.mark.parametrize("case", ["first attention", "all feed-forwards", "alternating"])
def test_what_is_loaded_can_be_saved_and_loaded_again(
    exports: dict[tuple[str, str], WrittenExport], tmp_path: Path, case: str
) -> None:
    model = load(exports["llama-bias-tied", case].path)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert type(again).__name__ == type(model).__name__
    ids = tiny_token_ids(2, 9)
    assert torch.equal(logits(again, ids), logits(model, ids))


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_true_export_passes_the_gate(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport]
) -> None:
    """What it does with another model is held by the export stage's tests, and by those of `compare` below."""
    family, case = "qwen3-mixed-windows", "first attention"
    expected = sources[family].masked_logits(REMOVED[case])
    result = verify(exports[family, case].path, REQUEST, expected, Loading("cpu", "float32", has_code=True))
    assert result.passed
    assert result.max_logit_difference <= 1e-5


def test_an_export_that_does_not_load_is_an_error_of_one_line(
    exports: dict[tuple[str, str], WrittenExport], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["llama", "first attention"].path, tmp_path / "model"))
    (folder / "modeling_blockpruned.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(ExportError, match="broken on purpose") as caught:
        verify(folder, REQUEST, {}, Loading("cpu", "float32", has_code=True))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("version", "loads"), [("4.57.1", False), ("5.0.0", True), ("10.1.0.dev0", True)])
def test_an_older_transformers_is_told_what_the_code_needs(
    exports: dict[tuple[str, str], WrittenExport], monkeypatch: pytest.MonkeyPatch, version: str, loads: bool
) -> None:
    """Of a version before 5 some families' modules want other arguments, and fail anywhere."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    code = exports["gemma2", "first attention"].path / "configuration_blockpruned.py"
    with nullcontext() if loads else pytest.raises(ImportError, match=r"needs transformers 5.*4\.57\.1"):
        runpy.run_path(str(code))


LOGITS = {"plain_logits": torch.tensor([1.0, -40.0]), "cached_logits": torch.tensor([2.0, 3.0])}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["answer", "expected", "both"])
def test_no_logit_that_is_not_finite_passes_the_gate(name: str, value: float, side: str) -> None:
    broken = LOGITS | {name: torch.tensor([value, 3.0])}
    answer = LOGITS if side == "expected" else broken
    expected = LOGITS if side == "answer" else broken
    assert not compare(answer, expected, "float32").passed


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(("off_by", "passes"), [(0.0, True), (2e-4, True), (6e-4, False), (1.0, False)])
def test_the_gate_allows_rounding_of_the_largest_logit(name: str, off_by: float, passes: bool) -> None:
    """40 at most, so 4e-4."""
    answer = LOGITS | {name: LOGITS[name] + torch.tensor([off_by, 0.0])}
    result = compare(answer, LOGITS, "float32")
    assert result.passed is passes
    assert result.max_logit_difference == pytest.approx(off_by, rel=1e-2)


def test_the_program_of_the_fresh_process_needs_nothing_of_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    names = runpy.run_path(fresh_load.__file__, run_name="not main")
    modules = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in names.values()}
    assert not any(str(module).startswith(("blockpruner", "stages", "flows")) for module in modules)


def test_the_request_of_the_gate_pads_on_the_left_and_fits_the_model() -> None:
    for vocab_size, max_positions in ((128, 256), (7, 16), (32000, 4096)):
        request = verification_request(vocab_size, max_positions)
        prompt, num_decoded = request["padded_ids"].shape[1], request["decode_ids"].shape[1]
        assert prompt + num_decoded <= max_positions
        assert all(int(request[name].max()) < vocab_size for name in ("plain_ids", "padded_ids", "decode_ids"))
        pads = (request["padded_mask"] == 0).sum(dim=1)
        assert pads[0] == 0
        assert 0 < pads[1] < pads[2] < prompt
        for row, count in zip(request["padded_mask"], pads.tolist(), strict=True):
            assert row[:count].sum() == 0
            assert row[count:].all()
