"""How engines load an export of each format, in the words of its model card (Markdown)."""

from __future__ import annotations

from blockpruner.export.names import ExportFormat

_WITH_CODE: tuple[ExportFormat, ...] = ("transformers", "decilm")

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


def _in_transformers(name: ExportFormat) -> tuple[str, ...]:
    # Without it transformers asks before it reads the tokenizer, too.
    code = ", trust_remote_code=True" if name in _WITH_CODE else ""
    return (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{code})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{code})',
        "```",
    )
