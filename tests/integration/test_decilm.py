"""Format `decilm`: the same logits in transformers and in MLX-LM, all of generation, and what other engines rely on."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from blockpruner.architectures import block_sizes, num_parameters
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export import fresh_load, verify_mlx
from blockpruner.export.verify import Loading, Verification
from blockpruner.export.verify_mlx import is_installed, verify_with_mlx_lm
from blockpruner.export.write import MANIFEST_FILE, WrittenExport, write_export
from blockpruner.masking import masked
from tests.integration.export_lab import (
    NUM_NEW,
    PROMPTS,
    REMOVED,
    REQUEST,
    WIDTHS,
    YARN,
    Source,
    ask_many,
    assert_is_placed,
    generate,
    greedy,
    load,
    logits,
)
from tests.tiny_models import save_tiny_model, tiny_token_ids

needs_mlx = pytest.mark.skipif(not is_installed(), reason="needs MLX-LM: pip install -c constraints.txt -e '.[mlx]'")

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias-tied": ("llama-bias-tied", {"mlp_bias": False}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    # Of these one case each: they differ in what is outside the blocks.
    "llama-wide": ("llama", {"hidden_size": 96, "intermediate_size": 768, "num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "llama-3": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA_3}}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}}),
    "mistral-wide-window": ("mistral", {"sliding_window": 256}),
    "qwen2-one-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED}),
}
FAMILIES = ("llama", "llama-bias-tied", "mistral", "qwen2")


def random_removal(seed: int) -> tuple[Block, ...]:
    """Two to five blocks, with an attention among those that are left."""
    generator = random.Random(seed)
    spared = mha(generator.randrange(4))
    return tuple(generator.sample([block for block in all_blocks(4) if block != spared], generator.randint(2, 5)))


LEADING, IN_A_ROW = "all attentions but one", "feed-forwards in a row"
"""With feed-forward blocks before the first attention, and with layers that have no attention behind it."""
CASES = {
    **REMOVED,
    "two layers": (mha(1), mlp(1), mlp(2), mha(2)),
    "first layer and the next attention": (mlp(0), mha(1), mha(0)),
    "little of each": (mlp(0), mha(1), mlp(2), mha(2), mlp(3)),
    **{f"random {seed}": random_removal(seed) for seed in range(4)},
}
KEYS = [(family, case) for family in FAMILIES for case in CASES] + [
    (family, IN_A_ROW) for family in SOURCES if family not in FAMILIES
]
every_case = pytest.mark.parametrize(("family", "case"), KEYS)
odd_cases = pytest.mark.parametrize(
    ("family", "case"), [("llama", LEADING), ("qwen2", "first attention"), ("mistral", IN_A_ROW), ("llama-3", IN_A_ROW)]
)
Exports = dict[tuple[str, str], WrittenExport]
Answers = dict[tuple[str, str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Source]]:
    root = tmp_path_factory.mktemp("decilm-sources")
    yield {
        name: Source.of(save_tiny_model(root / name, family, **(WIDTHS | overrides)))
        for name, (family, overrides) in SOURCES.items()
    }
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def exports(sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    root = tmp_path_factory.mktemp("decilm")
    yield {
        (family, case): write_export(
            sources[family].checkpoint, CASES[case], root / family / case.replace(" ", "-") / "model", "decilm"
        )
        for family, case in KEYS
    }
    shutil.rmtree(root)


def answers_of(program: ModuleType, exports: Exports, folder: Path) -> Answers:
    return ask_many(program, {key: export.path for key, export in exports.items()}, folder)


@pytest.fixture(scope="module")
def answers(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers_of(fresh_load, exports, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def mlx_answers(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    from blockpruner.export import fresh_mlx

    return answers_of(fresh_mlx, exports, tmp_path_factory.mktemp("mlx-answers"))


@pytest.fixture(scope="module")
def loaded(exports: Exports) -> Callable[[str, str], PreTrainedModel]:
    """Gives an export loaded in this process, once; not to be changed."""
    return functools.cache(lambda family, case: load(exports[family, case].path))


def config_of(export: WrittenExport) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((export.path / "config.json").read_text())
    return config


# --- the same logits and tokens ---------------------------------------------------------------------------------------


@every_case
def test_transformers_answers_as_the_masked_original(
    sources: dict[str, Source], answers: Answers, family: str, case: str
) -> None:
    expected = sources[family].masked_logits(CASES[case])
    assert answers[family, case].keys() == expected.keys()
    for name, tensor in expected.items():
        assert (answers[family, case][name] - tensor).abs().max() <= 1e-5, name


@needs_mlx
@every_case
def test_mlx_lm_answers_as_the_masked_original(
    sources: dict[str, Source], mlx_answers: Answers, family: str, case: str
) -> None:
    """At once, and through its cache."""
    expected = sources[family].masked_logits(CASES[case])["plain_logits"]
    assert mlx_answers[family, case].keys() == {"plain_logits", "cached_logits"}
    for name, answer in mlx_answers[family, case].items():
        assert (answer - expected).abs().max() <= 2e-5, name


@every_case
def test_generation_from_a_left_padded_batch_equals_generation_without_cache_or_padding(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    generated = generate(loaded(family, case), PROMPTS)
    assert generated == [greedy(sources[family], CASES[case], prompt, NUM_NEW) for prompt in PROMPTS]


@odd_cases
def test_a_static_cache_generates_the_same(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    generated = generate(loaded(family, case), PROMPTS, cache_implementation="static", disable_compile=True)
    assert generated == [greedy(sources[family], CASES[case], prompt, NUM_NEW) for prompt in PROMPTS]


@odd_cases
def test_beams_generate_the_same(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    source = sources[family]
    with masked(source.architecture, source.model, CASES[case]):
        expected = generate(source.model, PROMPTS, num_beams=4, use_cache=False)
    assert generate(loaded(family, case), PROMPTS, num_beams=4) == expected
    assert expected != [greedy(source, CASES[case], prompt, NUM_NEW) for prompt in PROMPTS]


@odd_cases
def test_prompt_lookup_generates_the_same(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    prompt = PROMPTS[1] * 3
    generated = generate(loaded(family, case), [prompt], prompt_lookup_num_tokens=4)
    assert generated == [greedy(sources[family], CASES[case], prompt, NUM_NEW)]


@odd_cases
def test_a_prompt_fed_in_chunks_gives_the_same_logits(
    sources: dict[str, Source], loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    model, ids = loaded(family, case), tiny_token_ids(2, 15, seed=8)
    with torch.inference_mode():
        first = model(input_ids=ids[:, :6], use_cache=True)
        second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    source = sources[family]
    with masked(source.architecture, source.model, CASES[case]):
        expected = logits(source.model, ids)
    assert (torch.cat([first.logits, second.logits], dim=1) - expected).abs().max() <= 2e-5


@odd_cases
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_has_an_entry_for_each_attention_and_knows_its_length(
    loaded: Callable[[str, str], PreTrainedModel], family: str, case: str, kind: str
) -> None:
    """An entry that stays empty would never be fetched back from where an offloaded cache puts it."""
    model, ids = loaded(family, case), tiny_token_ids(2, 8)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=16)
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, past_key_values=cache, disable_compile=True)
    attentions = [layer for layer in model.config.block_configs if not layer.attention.no_op]
    assert len(cache.layers) == len(attentions) < len(model.model.layers) + (case == "first attention")
    assert cache.is_initialized
    assert cache.get_seq_length() == 11  # all but the last token have been fed


def test_the_length_is_right_even_where_the_first_layer_has_no_attention(
    sources: dict[str, Source], exports: Exports, tmp_path: Path
) -> None:
    """Which we do not write, though the code in the export may be given it."""
    folder = Path(shutil.copytree(exports["llama", "first attention"].path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["block_configs"][0]["attention"] |= {"no_op": True, "n_heads_in_group": None}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    gone = ("model.layers.0.self_attn.", "model.layers.0.input_layernorm.")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(gone)}
    save_file(tensors, path, {"format": "pt"})
    expected = [greedy(sources["llama"], CASES["first attention"], prompt, NUM_NEW) for prompt in PROMPTS]
    assert generate(load(folder), PROMPTS) == expected
    assert generate(load(folder), PROMPTS, cache_implementation="static", disable_compile=True) == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(exports: Exports, checkpointing: bool) -> None:
    model = load(exports["llama", IN_A_ROW].path)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = tiny_token_ids(2, 12)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_hidden_states_are_one_a_layer_and_attentions_one_an_attention(exports: Exports) -> None:
    model = load(exports["llama", IN_A_ROW].path, attn_implementation="eager")
    output = model(input_ids=tiny_token_ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 7, 64)] * 5
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 4, 7, 7)] * 2


# --- what is in the folder --------------------------------------------------------------------------------------------


@every_case
def test_a_layer_has_the_tensors_of_its_surviving_blocks_and_no_others(
    sources: dict[str, Source], exports: Exports, loaded: Callable[[str, str], PreTrainedModel], family: str, case: str
) -> None:
    source, export = sources[family], exports[family, case]
    sizes = block_sizes(source.architecture, source.model)
    attentions = [block for block in (*export.kept, *export.zeros) if block.block_kind.value == "mha"]
    added = 64 * len(attentions) if family.startswith("qwen2") else 0  # the output projection's bias
    gone = sum(sizes[block] for block in CASES[case] if block not in export.zeros)
    expected = num_parameters(source.model) - gone + added
    tensors = load_file(export.path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == expected
    assert num_parameters(loaded(family, case)) == expected
    blocks = config_of(export)["block_configs"]
    for index, block in enumerate(blocks):
        for part, modules in (("attention", ("self_attn", "input_layernorm")), ("ffn", ("mlp", "post_attention_"))):
            has = [any(name.startswith(f"model.layers.{index}.{module}") for name in tensors) for module in modules]
            assert has == [not block[part]["no_op"]] * 2
        assert not (block["attention"]["no_op"] and block["ffn"]["no_op"])
    assert not blocks[0]["attention"]["no_op"]


@pytest.mark.parametrize(
    ("case", "carried"),
    [
        ("first attention", mha(0)),
        (LEADING, mha(0)),
        ("first layer and the next attention", mha(1)),
        ("first layer", None),
        ("first feed-forward", None),
        (IN_A_ROW, None),
    ],
)
def test_only_the_first_layers_attention_stays_and_adds_nothing(
    sources: dict[str, Source], exports: Exports, case: str, carried: Block | None
) -> None:
    """Its other weights are the original's."""
    for family in ("llama-bias-tied", "qwen2"):
        export = exports[family, case]
        assert export.zeros == ((carried,) if carried else ())
        manifest = json.loads((export.path / MANIFEST_FILE).read_text())
        assert tuple(map(Block.model_validate, manifest["zeros"])) == export.zeros
        assert manifest["places"].keys() == {str(block) for block in export.kept}
        for block in export.kept:
            assert_is_placed(sources[family], export, block, manifest["places"][str(block)])
        tensors = load_file(export.path / "model.safetensors")
        zeros = {name for name, tensor in tensors.items() if not tensor.any()}
        output = {f"model.layers.0.self_attn.o_proj.{kind}" for kind in ("weight", "bias")}
        added = {name for name in tensors if name.endswith("o_proj.bias")} if family == "qwen2" else set()
        assert zeros == (output if carried else set()) | added
        if carried:
            original = sources[family].model.state_dict()
            for part in ("self_attn.q_proj.weight", "self_attn.v_proj.bias", "input_layernorm.weight"):
                name = f"model.layers.{carried.layer_index}.{part}"
                assert torch.equal(tensors[f"model.layers.0.{part}"], original[name])


def test_block_configs_are_as_the_engines_read_them(exports: Exports) -> None:
    """To the key: MLX-LM refuses unknown ones."""
    config = config_of(exports["llama", "attentions in a row"])
    attention = {
        "no_op": False, "replace_with_linear": False, "sparsify": None, "n_heads_in_group": 2, "window_length": None,
        "num_sink_tokens": None, "use_prefill_window_in_sink_attention": False, "unshifted_sink": False,
    }  # fmt: skip
    ffn = {"no_op": False, "replace_with_linear": False, "sparsify": None, "ffn_mult": 6.0}
    no_ffn = ffn | {"no_op": True, "ffn_mult": None}
    assert config["block_configs"] == [
        {"attention": attention, "ffn": ffn},
        {"attention": attention, "ffn": no_ffn},
        {"attention": attention, "ffn": no_ffn},
        {"attention": attention, "ffn": ffn},
    ]
    no_attention = config_of(exports["llama", IN_A_ROW])["block_configs"][1]["attention"]
    assert no_attention == attention | {"no_op": True, "n_heads_in_group": None}


@every_case
def test_the_configuration_says_what_engines_ask_for_and_nothing_that_misleads_them(
    exports: Exports, family: str, case: str
) -> None:
    config = config_of(exports[family, case])
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert config["num_hidden_layers"] == len(config["block_configs"])
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] in (None, config["rope_parameters"])
    assert (config["rope_scaling"] is None) == (config["rope_parameters"]["rope_type"] == "default")
    assert config["torch_dtype"] == "float32"
    assert config["attention_bias"] == (family.startswith("qwen2") or family == "llama-bias-tied")
    assert not {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"} & config.keys()


def test_the_entries_of_block_configs_are_attributes_as_well(loaded: Callable[[str, str], PreTrainedModel]) -> None:
    """vLLM, SGLang and TensorRT-LLM read `block.attention.no_op`, and ask whether there is a `hidden_act`."""
    block = loaded("llama", IN_A_ROW).config.block_configs[1]
    assert (block.attention.no_op, block.ffn.no_op, block.ffn.ffn_mult) == (True, False, 6.0)
    assert not hasattr(block.ffn, "hidden_act")


def test_the_rotary_base_is_an_attribute_as_well(loaded: Callable[[str, str], PreTrainedModel]) -> None:
    """SGLang reads `getattr(config, "rope_theta", 10000)`, where transformers 5 leaves no such attribute."""
    assert [loaded(family, IN_A_ROW).config.rope_theta for family in ("llama-3", "qwen2")] == [500.0, 10000.0]


@pytest.mark.parametrize("family", ["llama", "llama-3", "llama-yarn", "qwen2"])
def test_what_is_loaded_can_be_saved_and_loaded_again(
    exports: Exports, loaded: Callable[[str, str], PreTrainedModel], tmp_path: Path, family: str
) -> None:
    """With the rotary settings in the words of other engines, which transformers itself would drop."""
    model = loaded(family, IN_A_ROW)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again, PADS), logits(model, PADS))
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    written = config_of(exports[family, IN_A_ROW])
    for key in ("block_configs", "rope_theta", "rope_scaling", "rope_parameters", "auto_map", "model_type"):
        assert saved[key] == written[key], key
    if is_installed():
        expected = dict.fromkeys(("plain_logits", "cached_logits"), logits(model, REQUEST["plain_ids"]))
        answer = ask_many(_fresh_mlx(), {0: tmp_path / "again"}, tmp_path)[0]
        assert all((answer[name] - tensor).abs().max() <= 2e-5 for name, tensor in expected.items())


PADS = tiny_token_ids(2, 9)


def _fresh_mlx() -> ModuleType:
    from blockpruner.export import fresh_mlx

    return fresh_mlx


def test_weights_in_another_dtype_are_all_in_it(sources: dict[str, Source], tmp_path: Path) -> None:
    export = write_export(sources["qwen2"].checkpoint, (mha(0),), tmp_path / "model", "decilm", dtype="bfloat16")
    assert {entry.dtype for entry in Checkpoint.open(str(export.path)).tensors.values()} == {"BF16"}
    assert config_of(export)["torch_dtype"] == "bfloat16"
    assert load(export.path, dtype="auto").dtype == torch.bfloat16


def test_rotary_frequencies_of_old_checkpoints_are_left_out(sources: dict[str, Source], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["llama"].checkpoint.path, tmp_path / "source"))
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}, path, {"format": "pt"})
    export = write_export(Checkpoint.open(str(folder)), (mha(2),), tmp_path / "model", "decilm")
    assert not [name for name in load_file(export.path / "model.safetensors") if "inv_freq" in name]


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "case"), [("llama", LEADING), ("qwen2", "first attention")])
@pytest.mark.parametrize("role", ["assisted", "assistant"])
def test_assisted_decoding_generates_the_same(
    sources: dict[str, Source], exports: Exports, family: str, case: str, role: str
) -> None:
    """With the dense model on the other side; tokens are taken back from the caches of both."""
    source, pruned = sources[family], load(exports[family, case].path)
    prompt, dense = PROMPTS[0], source.model
    if role == "assisted":
        assert generate(pruned, [prompt], assistant=dense) == [greedy(source, CASES[case], prompt, NUM_NEW)]
    else:
        assert generate(dense, [prompt], assistant=pruned) == [greedy(source, (), prompt, NUM_NEW)]


@pytest.fixture
def transformers_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a fresh process with transformers, where the test is about the other one."""
    monkeypatch.setattr(verify_mlx, "verify", lambda *_, **__: Verification(0.0, 1e-5))


CODE = Loading("cpu", "float32", has_code=True)


def gate(source: Source, export: WrittenExport) -> Any:
    expected = source.masked_logits(export.dropped)
    return verify_with_mlx_lm(export.path, REQUEST, expected, CODE)


@needs_mlx
def test_the_gate_asks_both(sources: dict[str, Source], exports: Exports) -> None:
    result = gate(sources["qwen2"], exports["qwen2", LEADING])
    assert result.passed
    assert result.engine == "transformers, mlx-lm"


@pytest.mark.usefixtures("transformers_passes")
def test_the_gate_says_who_was_asked_where_there_is_no_mlx_lm(
    sources: dict[str, Source], exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_mlx, "is_installed", lambda: False)
    result = gate(sources["llama"], exports["llama", LEADING])
    assert result.passed
    assert result.engine == "transformers"


@needs_mlx
@pytest.mark.usefixtures("transformers_passes")
def test_what_mlx_lm_alone_computes_otherwise_does_not_pass(
    sources: dict[str, Source], exports: Exports, tmp_path: Path
) -> None:
    """Another rotary base in the place where only MLX-LM reads it."""
    folder = Path(shutil.copytree(exports["llama", LEADING].path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 77.0}
    (folder / "config.json").write_text(json.dumps(config))
    expected = sources["llama"].masked_logits(CASES[LEADING])
    result = verify_with_mlx_lm(folder, REQUEST, expected, CODE)
    assert not result.passed
    assert result.engine == "mlx-lm"


@needs_mlx
@pytest.mark.usefixtures("transformers_passes")
def test_what_mlx_lm_does_not_load_is_an_error_of_one_line(
    sources: dict[str, Source], exports: Exports, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exports["llama", LEADING].path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["block_configs"][0]["ffn"]["unknown"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"cannot be loaded.*unknown") as caught:
        verify_with_mlx_lm(folder, REQUEST, sources["llama"].masked_logits(CASES[LEADING]), CODE)
    assert len(str(caught.value).splitlines()) == 1
