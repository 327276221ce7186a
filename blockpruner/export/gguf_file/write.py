"""Write the file: settings, vocabulary, and tensor after tensor, so that memory holds one of them at a time."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter, RopeScalingType

from blockpruner.export.gguf_file.encoding import FILE_TYPES
from blockpruner.export.gguf_file.families import DECI
from blockpruner.export.gguf_file.plan import FilePlan, context_length, make_plan
from blockpruner.export.gguf_file.tensors import file_tensors
from blockpruner.export.gguf_file.vocabulary import Vocabulary, read_vocabulary
from blockpruner.export.source import ExportSource

logger = logging.getLogger(__name__)

_NO_DTYPE = np.dtype(np.float32)


def write_file(source: ExportSource, path: Path) -> None:
    """Write a model as one GGUF file.

    Raises:
        ExportError: if llama.cpp cannot hold it, with the reason.
    """
    plan = make_plan(source)
    vocabulary = read_vocabulary(source.checkpoint, int(source.config.vocab_size))
    writer = GGUFWriter(path, plan.family.arch)
    _add_general(writer, plan)
    _add_sizes(writer, plan)
    _add_rotary(writer, plan)
    _add_vocabulary(writer, vocabulary)
    tensors = list(file_tensors(plan))
    for tensor in tensors:
        # Of a tensor given by its type, the dtype is not looked at.
        writer.add_tensor_info(tensor.name, tensor.shape, _NO_DTYPE, tensor.num_bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.encoded())
    writer.close()


def _add_general(writer: GGUFWriter, plan: FilePlan) -> None:
    name = plan.source.checkpoint.public_name
    writer.add_name(f"{name.rpartition('/')[2]}, {len(plan.source.removed)} residual blocks removed")
    writer.add_file_type(FILE_TYPES[plan.dtype])
    if plan.dtype == "q8_0":
        writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_sizes(writer: GGUFWriter, plan: FilePlan) -> None:
    config, heads = plan.source.config, plan.heads
    writer.add_block_count(len(plan.layers))
    writer.add_context_length(context_length(plan))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    # Said always: where layers differ, llama.cpp would derive them from the first one's number of heads.
    writer.add_key_length(heads.head_size)
    writer.add_value_length(heads.head_size)
    writer.add_rope_dimension_count(heads.head_size)
    if plan.family.arch == DECI:
        writer.add_head_count([count for count, _ in plan.num_heads])
        writer.add_head_count_kv([count for _, count in plan.num_heads])
        writer.add_feed_forward_length(plan.widths)
    else:
        writer.add_head_count(heads.num_heads)
        writer.add_head_count_kv(heads.num_key_value_heads)
        writer.add_feed_forward_length(int(config.intermediate_size))
    _add_windows(writer, plan)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(float(cap))
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(float(cap))


def _add_windows(writer: GGUFWriter, plan: FilePlan) -> None:
    """Layer by layer: the pattern that llama.cpp assumes where there is none is the unpruned model's."""
    if not plan.family.has_windows:
        return
    if any(plan.windowed):
        writer.add_sliding_window(int(plan.source.config.sliding_window))
        writer.add_sliding_window_pattern(plan.windowed)
    elif plan.family.arch == "gemma2":  # where llama.cpp aborts if no layer has a window: one that is never too short
        writer.add_sliding_window(context_length(plan))
        writer.add_sliding_window_pattern([True] * len(plan.layers))


def _add_rotary(writer: GGUFWriter, plan: FilePlan) -> None:
    rotary = plan.rotary
    writer.add_rope_freq_base(rotary.theta)
    if rotary.windowed_theta is not None:
        writer.add_rope_freq_base_swa(rotary.windowed_theta)
    if rotary.linear_factor != 1.0:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary.linear_factor)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, number in vocabulary.special_ids.items():
        adders[role](number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_remove_extra_whitespaces(vocabulary.drops_spaces)
    if vocabulary.drops_spaces:
        logger.warning(
            "this model's tokenizer drops spaces at the ends of a text and doubled ones, and llama.cpp does not: "
            "give it text without them"
        )
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
