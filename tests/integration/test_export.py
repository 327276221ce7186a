"""Exports: what is written computes what the masked original computes, wherever and however it is loaded.

Every family and every awkward set of removed blocks is written once and answered by one fresh process, which runs the
program of `verify` for each; the masked original and hand-written forwards say what the answers must be.
"""

from __future__ import annotations

import functools
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from blockpruner.architectures import Architecture, architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.checkpoint import Checkpoint, file_digest
from blockpruner.errors import ExportError, UnsupportedArchitectureError
from blockpruner.export import fresh_load
from blockpruner.export.names import FormatChoice
from blockpruner.export.verify import compare, masked_logits, verification_request, verify
from blockpruner.export.write import MANIFEST_FILE, WrittenExport, write_export
from blockpruner.loading import load_model
from blockpruner.masking import masked
from tests.oracles import oracle_logits
from tests.tiny_models import TINY_FAMILIES, VOCAB_SIZE, save_tiny_model, tiny_token_ids

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


@pytest.fixture(scope="module")
def sources(tiny_folder: TinyFolder) -> dict[str, Source]:
    return {family: Source.of(tiny_folder(family)) for family in TINY_FAMILIES}


@pytest.fixture(scope="module")
def exports(
    sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], WrittenExport]]:
    """Every case, each in a folder called `model`, as the stage writes it."""
    root = tmp_path_factory.mktemp("exports")
    yield {
        (family, case): write_export(
            sources[family].checkpoint, REMOVED[case], root / family / case.replace(" ", "-") / "model"
        )
        for family, case in CASES
    }
    shutil.rmtree(root)


_MANY = """
import runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = ["fresh_load", *line.split("\\t")]
    runpy.run_path({program!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def answers(
    exports: dict[tuple[str, str], WrittenExport], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What one fresh process, in a folder of its own, answers for every export."""
    folder = tmp_path_factory.mktemp("answers")
    save_file(REQUEST, folder / "request")
    numbered = list(enumerate(exports.items()))
    lines = [f"{export.path}\t{folder / 'request'}\t{folder / str(number)}" for number, (_, export) in numbered]
    program = _MANY.format(program=fresh_load.__file__)
    command = [sys.executable, "-I", "-c", program]
    finished = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd=folder, check=False)
    assert finished.returncode == 0, finished.stderr
    return {key: load_file(folder / str(number)) for number, (key, _) in numbered}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load an export as a user would; a stock one must need no code."""
    is_custom = bool(list(folder.glob("*.py")))
    if is_custom:
        options["trust_remote_code"] = True
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))
    model.eval()
    return model


@pytest.fixture(scope="module")
def loaded(exports: dict[tuple[str, str], WrittenExport]) -> Callable[[str, str], PreTrainedModel]:
    """Gives an export loaded in this process, once; not to be changed."""

    @functools.cache
    def model(family: str, case: str) -> PreTrainedModel:
        return load(exports[family, case].path)

    return model


@torch.inference_mode()
def logits(model: PreTrainedModel, token_ids_BT: Tensor) -> Tensor:
    answer: Tensor = model(input_ids=token_ids_BT, use_cache=False).logits
    return answer


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


def generate(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    batch = left_padded(prompts)
    settings = GenerationConfig(
        max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0, eos_token_id=2, **options
    )
    output = model.generate(**batch, generation_config=settings)
    rows: list[list[int]] = output[:, batch["input_ids"].shape[1] :].tolist()
    return rows


@every_case
def test_generation_from_a_left_padded_batch_equals_generation_without_cache_or_padding(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    generated = generate(loaded(family, case), PROMPTS)
    assert generated == [greedy(sources[family], REMOVED[case], prompt, NUM_NEW) for prompt in PROMPTS]


# --- what is in the folder --------------------------------------------------------------------------------------------


@every_case
def test_a_file_has_the_parameters_of_the_surviving_blocks(
    sources: dict[str, Source],
    exports: dict[tuple[str, str], WrittenExport],
    loaded: Callable[[str, str], PreTrainedModel],
    family: str,
    case: str,
) -> None:
    source, export = sources[family], exports[family, case]
    expected = num_parameters(source.model)
    if export.format != "zeroed":
        sizes = block_sizes(source.architecture, source.model)
        expected -= sum(sizes[block] for block in REMOVED[case]) + shared_size(source, REMOVED[case])
    assert sum(tensor.numel() for tensor in load_file(export.path / "model.safetensors").values()) == expected
    assert num_parameters(loaded(family, case)) == expected


def shared_size(source: Source, removed: tuple[Block, ...]) -> int:
    """Parameters of what serves both blocks of a layer, of the layers that lost both."""
    gone = [index for index in range(4) if {mha(index), mlp(index)} <= set(removed)]
    layers = [source.architecture.decoder_layers(source.model)[index] for index in gone]
    shared = [layer.get_submodule(name) for layer in layers for name in source.architecture.shared]
    return sum(parameter.numel() for module in shared for parameter in module.parameters())


def expected_format(source: Source, family: str, case: str) -> str:
    if family == "gpt2-scaled":  # attention scores are scaled by the layer's number, which only the last may lose
        return "stock" if case == "last layer" else "zeroed"
    if source.architecture.is_parallel:
        return "stock" if case in ("first layer", "last layer") else "zeroed"
    if case in STOCK:
        return "stock"
    return "transformers" if family.partition("-")[0] in WITH_CODE else "zeroed"


@every_case
def test_the_format_is_the_smallest_that_can_hold_the_model(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str
) -> None:
    export = exports[family, case]
    config = json.loads((export.path / "config.json").read_text())
    assert export.format == expected_format(sources[family], family, case)
    assert bool(list(export.path.glob("*.py"))) == ("auto_map" in config) == (export.format == "transformers")


@every_family
def test_a_stock_export_differs_from_its_source_in_the_number_of_layers_only(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str
) -> None:
    source = dict(sources[family].checkpoint.config)
    config = json.loads((exports[family, "last layer"].path / "config.json").read_text())
    changed = {key for key in source | config if source.get(key) != config.get(key)}
    number = sources[family].model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    assert changed <= {number, "layer_types", "max_window_layers", "decoder_sparse_step", "mlp_only_layers"}
    assert (config["model_type"], config[number]) == (source["model_type"], 3)


@pytest.mark.parametrize(
    ("case", "layer_types"),
    [
        ("alternating", ["full", "sliding", "sliding"]),  # attentions 0, 1 and 3
        ("first layer", ["sliding", "full", "sliding"]),
        ("first attention", ["sliding", "full", "sliding"]),
        ("feed-forwards in a row", ["full", "sliding"]),
        ("all attentions but one", ["full"]),
        ("all but an attention", ["sliding"]),
    ],
)
@pytest.mark.parametrize("family", ["qwen2-mixed-windows", "qwen3-mixed-windows"])
def test_layer_types_follow_their_attention(
    exports: dict[tuple[str, str], WrittenExport], family: str, case: str, layer_types: list[str]
) -> None:
    config = json.loads((exports[family, case].path / "config.json").read_text())
    assert config["layer_types"] == [f"{name}_attention" for name in layer_types]
    assert config["sliding_window"] == 6


def test_layer_types_that_the_source_only_implies_are_written_out(tmp_path: Path) -> None:
    """Qwen2's windows begin at `max_window_layers` when nothing else is said; renumbering must not move them."""
    folder = save_tiny_model(
        tmp_path / "source", "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2
    )
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_types") == ["full_attention"] * 2 + ["sliding_attention"] * 2
    (folder / "config.json").write_text(json.dumps(config))
    source, removed = Source.of(folder), (mha(0), mlp(0))
    export = write_export(source.checkpoint, removed, tmp_path / "model")
    assert json.loads((export.path / "config.json").read_text())["layer_types"] == [
        "full_attention", "sliding_attention", "sliding_attention",
    ]  # fmt: skip
    expected = source.masked_logits(removed)["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["alternating", "first attention"])
def test_tokenizer_and_generation_config_come_along(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], case: str
) -> None:
    source, export = sources["llama"].checkpoint.path, exports["llama", case].path
    text = "The river, and the lantern keeper."
    assert AutoTokenizer.from_pretrained(export)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert (export / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


@every_case
def test_the_manifest_is_true(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], family: str, case: str
) -> None:
    export = exports[family, case]
    manifest = json.loads((export.path / MANIFEST_FILE).read_text())
    kept = tuple(Block.model_validate(block) for block in manifest["kept"])
    dropped = tuple(Block.model_validate(block) for block in manifest["dropped_in_order"])
    assert dropped == REMOVED[case] == export.dropped
    assert kept == tuple(block for block in all_blocks(4) if block not in dropped) == export.kept
    assert manifest["source_fingerprint"] == sources[family].checkpoint.fingerprint
    assert manifest["format"] == export.format
    assert ("layers" in manifest) == (export.format != "zeroed" and not sources[family].architecture.is_parallel)
    if "layers" in manifest:
        assert sum(1 + len(layer["leading_mlps"]) + len(layer["mlps"]) for layer in manifest["layers"]) == len(kept)
    files = {file.name for file in export.path.iterdir()} - {MANIFEST_FILE}
    assert manifest["files"] == {name: file_digest(export.path / name) for name in files}


def test_the_same_export_is_the_same_bytes(sources: dict[str, Source], tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        export = write_export(sources["llama"].checkpoint, REMOVED["first attention"], tmp_path / name)
        digests.append({file.name: file_digest(file) for file in export.path.iterdir()})
    assert digests[0] == digests[1]


# --- options and odd sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["alternating", "feed-forwards in a row"])
def test_shards_hold_the_same_model(
    sources: dict[str, Source], exports: dict[tuple[str, str], WrittenExport], tmp_path: Path, case: str
) -> None:
    whole = load(exports["qwen3", case].path)
    export = write_export(sources["qwen3"].checkpoint, REMOVED[case], tmp_path / "model", shard_bytes=20_000)
    shards = sorted(export.path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (export.path / "model.safetensors").exists()
    assert all(sum(t.numel() * 4 for t in load_file(shard).values()) <= 20_000 for shard in shards)
    index = json.loads((export.path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for shard in shards for t in load_file(shard).values())
    tensors = load(export.path).state_dict()
    assert tensors.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.state_dict().items())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(sources: dict[str, Source], tmp_path: Path) -> None:
    export = write_export(sources["llama"].checkpoint, (mha(0),), tmp_path / "model", shard_bytes=1)
    names = [name for shard in export.path.glob("model-*.safetensors") for name in load_file(shard)]
    assert len(names) == len(set(names)) == len(list(export.path.glob("model-*.safetensors")))
    assert Checkpoint.open(str(export.path)).tensors.keys() == set(names)


def test_a_sharded_source_is_read_from_all_its_files(tmp_path: Path, sources: dict[str, Source]) -> None:
    source = sources["llama"]
    sharded = Path(shutil.copytree(source.checkpoint.path, tmp_path / "sharded"))
    (sharded / "model.safetensors").unlink()
    source.model.save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    export = write_export(Checkpoint.open(str(sharded)), REMOVED["alternating"], tmp_path / "model")
    expected = source.masked_logits(REMOVED["alternating"])["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


def test_a_stock_layout_can_be_written_with_code_too(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["qwen2"]
    export = write_export(source.checkpoint, REMOVED["alternating"], tmp_path / "model", "transformers")
    assert export.format == "transformers"
    expected = source.masked_logits(REMOVED["alternating"])["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


def test_stock_that_cannot_be_is_refused_before_anything_is_written(sources: dict[str, Source], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="format stock"):
        write_export(sources["llama"].checkpoint, (mha(0),), tmp_path / "model", "stock")
    assert not (tmp_path / "model").exists()


def test_a_model_without_attention_is_refused_before_anything_is_written(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    for wanted in ("stock", "transformers"):
        with pytest.raises(ExportError, match="no attention block"):
            write_export(sources["llama"].checkpoint, all_blocks(4, "mha"), tmp_path / "model", wanted)
        assert not (tmp_path / "model").exists()


def with_tensors(folder: Path, **tensors: Tensor) -> Checkpoint:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})
    return Checkpoint.open(str(folder))


def test_parts_that_nobody_knows_are_not_left_behind_in_silence(tmp_path: Path) -> None:
    checkpoint = with_tensors(
        save_tiny_model(tmp_path / "source"), **{"model.layers.1.adapter.weight": torch.zeros(2, 2)}
    )
    with pytest.raises(UnsupportedArchitectureError, match=r"model\.layers\.1\.adapter\.weight"):
        write_export(checkpoint, (mha(0),), tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "wanted", "reason"),
    [
        ("gpt2", "transformers", "and this is a gpt2"),
        ("cohere", "stock", "side by side"),
        ("falcon", "stock", "side by side"),
        ("falcon", "transformers", "and this is a falcon"),
        ("gpt2-scaled", "stock", "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(
    tiny_folder: TinyFolder, tmp_path: Path, family: str, wanted: FormatChoice, reason: str
) -> None:
    checkpoint = Checkpoint.open(str(tiny_folder(family)))
    with pytest.raises(ExportError, match=reason) as caught:
        write_export(checkpoint, (mlp(1), mha(2)), tmp_path / "model", wanted)
    assert len(str(caught.value).splitlines()) == 1
    assert "--format" in str(caught.value)


def test_layers_beyond_the_configured_ones_are_left_out(tmp_path: Path) -> None:
    """Who shortens a model by its config.json alone gets weights that nothing reads."""
    folder = save_tiny_model(tmp_path / "source")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    source, removed = Source.of(folder), (mha(1),)
    export = write_export(source.checkpoint, removed, tmp_path / "model")
    assert export.kept == (mha(0), mlp(0), mlp(1), mha(2), mlp(2))
    expected = source.masked_logits(removed)["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", ["alternating", "first attention"])
def test_a_config_in_the_old_words_keeps_them(tmp_path: Path, case: str) -> None:
    """`rope_theta` and `torch_dtype` at the top level, as on the hub: other engines know no other words for them."""
    folder = save_tiny_model(
        tmp_path / "source", "llama", rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    path.write_text(json.dumps(config | {"rope_theta": 777.0, "torch_dtype": "float32"}))
    source = Source.of(folder)
    export = write_export(source.checkpoint, REMOVED[case], tmp_path / "model")
    written = json.loads((export.path / "config.json").read_text())
    assert (written["rope_theta"], written["torch_dtype"]) == (777.0, "float32")
    expected = oracle_logits(
        source.model.state_dict(),
        source.model.config.to_dict(),
        REQUEST["plain_ids"],
        {(block.layer_index, block.block_kind.value) for block in REMOVED[case]},
    )
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 2e-5


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("case", ["alternating", "first attention"])
def test_scaled_rotary_embeddings_and_bfloat16_weights_stay_as_they_are(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "source"
    save_tiny_model(folder, "llama", rope_parameters=LLAMA_3_ROPE)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    source = Source.of(folder)
    export = write_export(source.checkpoint, REMOVED[case], tmp_path / "model")
    assert {entry.dtype for entry in Checkpoint.open(str(export.path)).tensors.values()} == {"BF16"}
    assert load(export.path, dtype="auto").dtype == torch.bfloat16
    expected = source.masked_logits(REMOVED[case])["plain_logits"]
    assert (logits(load(export.path), REQUEST["plain_ids"]) - expected).abs().max() <= 1e-5


# --- everything else that is done with a model ------------------------------------------------------------------------

LEADING = "all attentions but one"
"""The layout that is farthest from a stock one: feed-forwards before and after the only attention."""
ODD_CASES = [("llama", "first attention"), ("qwen2-mixed-windows", "first attention"), ("mistral-window", LEADING)]
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
    result = verify(exports[family, case].path, REQUEST, expected, device="cpu", dtype="float32")
    assert result.passed
    assert result.max_logit_difference <= 1e-5


def test_an_export_that_does_not_load_is_an_error_of_one_line(
    exports: dict[tuple[str, str], WrittenExport], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["llama", "first attention"].path, tmp_path / "model"))
    (folder / "modeling_blockpruned.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(ExportError, match="broken on purpose") as caught:
        verify(folder, REQUEST, {}, device="cpu", dtype="float32")
    assert len(str(caught.value).splitlines()) == 1


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
