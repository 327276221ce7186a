"""How engines load an export of each format, in the words of its model card (Markdown)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from blockpruner.export.formats import FORMATS
from blockpruner.export.names import ExportFormat
from blockpruner.export.settings import window_period

_DECILM = (
    "Other engines load it as a `DeciLMForCausalLM`; of the code in this folder they run no more than the "
    "configuration's:",
    "",
    "```sh",
    'mlx_lm.generate --model . --trust-remote-code --prompt "..."',
    "vllm serve . --trust-remote-code",
    "python -m sglang.launch_server --model-path . --trust-remote-code",
    "trtllm-serve . --trust_remote_code  # not where attentions have biases (Qwen2), which it skips",
    "```",
)
_GGUF = (
    "Tokenizer and chat template are in the file; transformers does not load it.",
    "",
    "```sh",
    "llama-cli -m model.gguf     # llama.cpp; as a server: llama-server -m model.gguf",
    "printf 'FROM ./model.gguf\\n' > Modelfile && ollama create pruned -f Modelfile && ollama run pruned",
    "```",
    "",
    "```python",
    "from llama_cpp import Llama  # pip install llama-cpp-python",
    "",
    'model = Llama("model.gguf", n_ctx=0)  # 0: as long as the model reads',
    "```",
    "",
    "LM Studio and other programs that are built on llama.cpp take the same file.",
)


_NUMBERED = (
    "Which layers have a sliding window stands in `layer_types` of config.json, and no rule by the layer's number says "
    "it any more. {engines}"
)
_WITHOUT_RULE = {
    "gemma3_text": "MLX-LM, and vLLM of early 2025, know only such a rule, and refuse this model (the rule's number, "
    "`sliding_window_pattern`, is null so that they do).",
    "cohere2": "MLX-LM knows only such a rule, and refuses this model (the rule's number, `sliding_window_pattern`, is "
    "null so that it does).",
    "gemma2": "SGLang knows only such a rule (every other layer, from the first on) and computes something else in "
    "silence where a text is longer than the window: do not use it for this model.",
}
"""What becomes of a family in engines that derive the windows from a layer's number."""


def remark_on_windows(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines of Markdown on engines that would give other layers of a stock model a window; none where none would.

    Args:
        config: the export's config.json.
    """
    engines, types = _WITHOUT_RULE.get(config["model_type"]), config.get("layer_types")
    expected = 2 if config["model_type"] == "gemma2" else config.get("sliding_window_pattern")
    if engines is None or types is None or (expected and window_period(types) == expected):
        return ()
    return ("", _NUMBERED.format(engines=engines))


def how_to_load(name: ExportFormat) -> tuple[str, ...]:
    """Lines of Markdown."""
    match name:
        case "gguf":
            return _GGUF
        case "decilm":
            return (*_in_transformers(name), "", *_DECILM)
        case "stock":
            return (
                *_in_transformers(name),
                "",
                "To other engines it is a model like the original, only smaller: what loads that loads this.",
            )
        case "zeroed":
            return (
                *_in_transformers(name),
                "",
                "To other engines it is a model like the original: what loads that loads this.",
            )
        case "transformers":
            return _in_transformers(name)


_TRANSFORMERS_OF_CODE = 5
"""What the code in `templates` needs, as it says itself where it meets an older one."""


def _in_transformers(name: ExportFormat) -> tuple[str, ...]:
    written_with = f"transformers {transformers.__version__}"
    needs = f"transformers {_TRANSFORMERS_OF_CODE} or newer" if FORMATS[name].has_code else "what the original needs"
    # Without a word transformers asks before it reads the tokenizer, too, which needs none of the code.
    code, no_code = (", trust_remote_code=True", ", trust_remote_code=False") if FORMATS[name].has_code else ("", "")
    return (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{code})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{no_code})',
        "```",
        "",
        f"Compared with the original in {written_with}; it needs {needs}.",
    )
