"""Format gguf in llama.cpp itself: `pytest -m engines`, where llama-cpp-python is installed.

Every file that `test_gguf` gives to our own reader is loaded and run here, and the tokenizer in it cuts texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from blockpruner.blocks import Block, mha, mlp
from blockpruner.export.formats import FORMATS
from blockpruner.export.gguf_file.format import MODEL_FILE
from blockpruner.export.gguf_file.verification import _PROGRAM
from blockpruner.export.names import ExportDtype
from blockpruner.export.verify import Loading, ask
from blockpruner.export.write import write_export
from blockpruner.masking import masked
from tests.integration.export_lab import NUM_NEW, PROMPTS, REQUEST, Source, finished_search, greedy, logits, run
from tests.integration.gguf_lab import CUTS, HELD, TEXTS, TOKENIZERS, make_source, with_tokenizer
from tests.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python: see README"),
]


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    root = tmp_path_factory.mktemp("gguf-sources")
    return functools.cache(lambda shape: make_source(root, shape))


def opened(folder: Path, **options: Any) -> Any:
    from llama_cpp import Llama

    return Llama(str(folder / MODEL_FILE), n_gpu_layers=0, verbose=False, **options)


@pytest.mark.parametrize(("shape", "cut"), HELD)
def test_llama_cpp_computes_and_generates_what_the_masked_original_does(
    source_of: Callable[[str], Source], tmp_path: Path, shape: str, cut: str
) -> None:
    from llama_cpp import GGML_TYPE_F32

    source, removed = source_of(shape), CUTS[cut]
    write_export(source.checkpoint, removed, tmp_path, "gguf", dtype="float32")
    verify, expected = FORMATS["gguf"].verify, source.masked_logits(removed)
    verification = verify(tmp_path, REQUEST, expected, Loading("cpu", "float32"))
    assert verification.engine == "reader, llama.cpp"
    # Gemma's activations are looked up in tables of half precision.
    assert verification.max_logit_difference <= (5e-3 if shape.startswith("gemma") else 5e-5)
    model = opened(tmp_path, n_ctx=64, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    end = source.model.config.eos_token_id
    for prompt in PROMPTS:
        model.reset()
        tokens, new = prompt, []
        for _ in range(NUM_NEW):
            model.eval(tokens)
            scores_V = model.scores[model.n_tokens - 1].copy()
            scores_V[end] = float("-inf")
            tokens = [int(scores_V.argmax())]
            new += tokens
        assert new == greedy(source, removed, prompt, NUM_NEW) or is_nearly_as_good(source, removed, prompt, new)
    model.close()


def is_nearly_as_good(source: Source, removed: tuple[Block, ...], prompt: list[int], new: list[int]) -> bool:
    """Whether each new token of a Gemma, whose logits are that coarse, is the best but for a rounding."""
    with masked(source.architecture, source.model, removed):
        scores_TV = logits(source.model, torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1].clone()
    scores_TV[:, source.model.config.eos_token_id] = -torch.inf
    lost = scores_TV.amax(dim=1) - scores_TV.gather(1, torch.tensor(new)[:, None])[:, 0]
    return source.checkpoint.model_type.startswith("gemma") and bool((lost <= 1e-2).all())


@pytest.mark.parametrize("dtype", get_args(ExportDtype))
@pytest.mark.parametrize("cut", ["alternating", "first attention", "attentions in a row"])
def test_llama_cpp_takes_every_dtype(
    source_of: Callable[[str], Source], tmp_path: Path, cut: str, dtype: ExportDtype
) -> None:
    """And computes as coarsely as the gate allows for."""
    source = make_source(tmp_path, "llama, wide heads")
    write_export(source.checkpoint, CUTS[cut], tmp_path / "model", "gguf", dtype=dtype)
    format_ = FORMATS["gguf"]
    format_.coarsen(source.model, tmp_path / "model", None)
    expected = source.masked_logits(CUTS[cut])
    assert format_.verify(tmp_path / "model", REQUEST, expected, Loading("cpu", "float32")).passed


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    source = with_tokenizer(tmp_path / "source", tokenizer)
    write_export(source.checkpoint, (mha(0),), tmp_path / "model", "gguf")
    model = opened(tmp_path / "model", vocab_only=True)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"], text
    model.close()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_the_gate_gives_llama_cpp_a_window_that_it_sees(tmp_path: Path, family: str) -> None:
    """As long as in the file, it would not differ from none within the request."""
    wanted = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16} if family == "gemma2" else {}
    source = save_tiny_model(tmp_path / "source", family, sliding_window=64, **wanted)
    inputs = finished_search(source, (mha(0), mlp(0)), tmp_path)
    assert run(tmp_path, inputs, format="gguf").verified_with == "reader, llama.cpp"
    own = Loading("cpu", "float32")
    expected = Source.of(source).masked_logits((mha(0), mlp(0)))
    shorter = FORMATS["gguf"].verify(tmp_path / "out" / "model", REQUEST, expected, Loading("cpu", "float32", window=9))
    assert FORMATS["gguf"].verify(tmp_path / "out" / "model", REQUEST, expected, own).passed
    assert not shorter.passed
    given = ask(_PROGRAM, tmp_path / "out" / "model" / MODEL_FILE, REQUEST, "--sliding-window", "9")
    assert (given["plain_logits"] - expected["plain_logits"]).abs().max() > 0.1
