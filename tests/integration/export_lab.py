"""What the tests of exports share: awkward sets of removed blocks, sources, and ways to load and to generate."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from blockpruner.architectures import Architecture, architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.export import fresh_load
from blockpruner.export.verify import masked_logits, verification_request
from blockpruner.export.write import WrittenExport
from blockpruner.loading import load_model, meta_model
from blockpruner.masking import masked
from blockpruner.trace import CandidateScore, SearchStep, SearchSummary, write_trace
from stages.contract import ArtifactRef, Runtime
from stages.export import STAGE, ExportConfig, ExportInputs, ExportManifest
from tests.oracles import oracle_logits
from tests.tiny_models import TINY_FAMILIES, VOCAB_SIZE, tiny_token_ids

TinyFolder = Callable[[str], Path]

REMOVED: Mapping[str, tuple[Block, ...]] = {
    "alternating": (mlp(1), mha(2)),
    "first layer": (mha(0), mlp(0)),
    "last layer": (mlp(3), mha(3)),
    "first attention": (mha(0),),
    "first feed-forward": (mlp(0),),
    "last attention": (mha(3),),
    "last feed-forward": (mlp(3),),
    "feed-forwards in a row": (mha(2), mha(1)),
    "attentions in a row": (mlp(1), mlp(2)),
    "all attentions but one": (mha(0), mha(3), mha(1)),
    "all feed-forwards": all_blocks(4, "mlp"),
    "all but an attention": tuple(block for block in all_blocks(4) if block != mha(1)),
}
WIDTHS = {"hidden_size": 64, "intermediate_size": 256}
"""Of a tiny model that the engines' arithmetic of widths can hold."""
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
STOCK = frozenset({"alternating", "first layer", "last layer"})
WITH_CODE = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
CASES = [(family, case) for family in TINY_FAMILIES for case in REMOVED]
every_case = pytest.mark.parametrize(("family", "case"), CASES)
every_family = pytest.mark.parametrize("family", TINY_FAMILIES)
REQUEST = verification_request(VOCAB_SIZE, 256)


@dataclass(frozen=True)
class Source:
    """A tiny model on disk and in memory."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    architecture: Architecture

    @classmethod
    def of(cls, folder: Path) -> Source:
        checkpoint = Checkpoint.open(str(folder))
        model = load_model(checkpoint, device="cpu", dtype="float32")
        return cls(checkpoint, model, architecture_of(checkpoint.model_type).for_config(model.config))

    def masked_logits(self, removed: tuple[Block, ...]) -> dict[str, Tensor]:
        return masked_logits(self.architecture, self.model, removed, REQUEST)

    def oracle_logits(self, removed: tuple[Block, ...], token_ids_BT: Tensor) -> Tensor:
        gone = {(block.layer_index, block.block_kind.value) for block in removed}
        return oracle_logits(self.model.state_dict(), self.model.config.to_dict(), token_ids_BT, gone)


def finished_search(model: Path, order: tuple[Block, ...], folder: Path) -> ExportInputs:
    """A model and a search over it that removed these blocks."""
    search = folder / "search"
    search.mkdir()
    checkpoint = Checkpoint.open(str(model))
    architecture, shapes = meta_model(checkpoint)
    sizes, total = block_sizes(architecture, shapes), num_parameters(shapes)
    steps = []
    for number, block in enumerate(order, start=1):
        removed = sum(sizes[gone] for gone in order[:number])
        candidate = CandidateScore(block=block, score=10.0 + number, perplexity=10.0 + number, rank=1, chosen=True)
        steps.append(
            SearchStep(
                step=number,
                block=block,
                score=10.0 + number,
                perplexity=10.0 + number,
                num_parameters_removed=removed,
                ratio=removed / total,
                seconds=0.5,
                candidates=(candidate,),
            )
        )
    write_trace(search, SearchSummary(dense_perplexity=10.0, num_layers=4, num_parameters=total), steps)
    return ExportInputs(checkpoint, ArtifactRef("5" * 64, search))


def run(folder: Path, inputs: ExportInputs, **config: Any) -> ExportManifest:
    """Run the export stage into `folder`/out."""
    out_dir = folder / "out"
    out_dir.mkdir(exist_ok=True)
    return STAGE.run(ExportConfig(**config), inputs, out_dir, Runtime())


def change_config(folder: Path, **changes: Any) -> Path:
    """Change settings in a model's config.json; None leaves one out."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def assert_is_placed(source: Source, export: WrittenExport, block: Block, place: str) -> None:
    """The block's weights are in the export under the layer that the manifest says."""
    tensors, written = (load_file(path / "model.safetensors") for path in (source.checkpoint.path, export.path))
    names = [name for name in tensors if source.architecture.block_of_tensor(name) == block]
    assert names
    for name in names:
        renamed = source.architecture.placed(name, place)
        assert torch.equal(written[renamed], tensors[name]), renamed


_MANY = """
import runpy, sys
sys.modules.update(dict.fromkeys(("blockpruner", "stages", "flows", "tests")))  # whoever imports one of them fails
for line in sys.stdin.read().splitlines():
    sys.argv = ["", *line.split("\\t")]
    runpy.run_path({program!r}, run_name="__main__")
"""
Key = TypeVar("Key")


def ask_many(
    program: ModuleType, exports: Mapping[Key, Path], folder: Path, request: Mapping[str, Tensor] = REQUEST
) -> dict[Key, dict[str, Tensor]]:
    """What a program of the gate answers for every export, in one process that can import nothing of this project."""
    save_file(dict(request), folder / "request.safetensors")
    answers = {key: folder / f"{number}.safetensors" for number, key in enumerate(exports)}
    lines = [
        "\t".join([str(path), str(folder / "request.safetensors"), str(answers[key]), *_code(program, path)])
        for key, path in exports.items()
    ]
    command = [sys.executable, "-I", "-c", _MANY.format(program=program.__file__)]
    finished = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd=folder, check=False)
    assert finished.returncode == 0, finished.stderr
    return {key: load_file(path) for key, path in answers.items()}


def ask_here(program: Path, export_dir: Path, request: Mapping[str, Tensor], *options: str) -> dict[str, Tensor]:
    """In place of `verify.ask`, without the seconds that a process of its own takes to start."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        asked, answered = f"{folder}/request.safetensors", f"{folder}/answer.safetensors"
        save_file(dict(request), asked)
        patch.setattr(sys, "argv", [str(program), str(export_dir), asked, answered, *options])
        runpy.run_path(str(program), run_name="__main__")
        return load_file(answered)


def verify_here(patch: pytest.MonkeyPatch) -> None:
    """Let the gate ask in this process."""
    import blockpruner.export.gguf_file.verification  # noqa: F401  # else it would import the stand-in, and keep it

    patch.setattr("blockpruner.export.verify.ask", ask_here)


def _code(program: ModuleType, folder: Path) -> list[str]:
    return ["--has-code"] if program is fresh_load and list(folder.glob("*.py")) else []


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load an export as a user would; a stock one must need no code."""
    is_custom = bool(list(folder.glob("*.py")))
    if is_custom:
        options["trust_remote_code"] = True
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))
    model.eval()
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel, token_ids_BT: Tensor) -> Tensor:
    answer: Tensor = model(input_ids=token_ids_BT, use_cache=False).logits
    return answer


def greedy(source: Source, removed: tuple[Block, ...], prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy generation from the masked original: one row, no padding, no cache; never the end token."""
    ids = list(prompt)
    with masked(source.architecture, source.model, removed):
        for _ in range(num_tokens):
            scores_V = logits(source.model, torch.tensor([ids]))[0, -1].clone()
            scores_V[source.model.config.eos_token_id] = -torch.inf
            ids.append(int(scores_V.argmax()))
    return ids[len(prompt) :]


PROMPTS = [row[start:].tolist() for row, start in zip(tiny_token_ids(3, 11, seed=6), (0, 4, 9), strict=True)]
"""Of 11, 7 and 2 tokens: longer than the windows, and much shorter."""
NUM_NEW = 9


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads]),
    }


def generate(
    model: Any, prompts: list[list[int]], assistant: PreTrainedModel | None = None, **options: Any
) -> list[list[int]]:
    batch = left_padded(prompts)
    settings = GenerationConfig(
        max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0, eos_token_id=2, **options
    )
    output = model.generate(**batch, generation_config=settings, assistant_model=assistant)
    rows: list[list[int]] = output[:, batch["input_ids"].shape[1] :].tolist()
    return rows
