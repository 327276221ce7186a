"""What every setting of a run means, in one line each. The command line's help and the Prefect server's form show it.

Plain text, so that `--help` need not import what the recipe needs.
"""

from __future__ import annotations

SETTINGS: dict[str, str] = {
    "model": "The model: a folder with config.json and safetensors weights, or a hub id.",
    "calibration": (
        "The calibration set: alpaca, wikitext2, c4 or ptb (sampled as in the paper), a hub dataset, "
        "or a .txt, .jsonl, .csv or .parquet file."
    ),
    "calibration_column": "The column with the text, for a calibration file or dataset that has several.",
    "num_samples": "How many rows of the calibration set to take, drawn with the seed; 'all' takes all, in order.",
    "sequence_length": "Tokens in one sequence.",
    "seed": "Seed of the drawing of rows.",
    "num_blocks": "How many blocks to remove (K), counted from the whole model; this or the ratio.",
    "ratio": "Remove blocks until this share of all parameters is gone (between 0 and 1); this or a number of blocks.",
    "block_kinds": "Which blocks may be removed: mha (attention), mlp (feed-forward) or both.",
    "export_blocks": "Export without only the first so many blocks of the pruning order; none: without all of them.",
    "export_format": (
        "auto, stock (the family's own format), transformers (with custom code), decilm (for vLLM, SGLang, "
        "TensorRT-LLM and MLX-LM), gguf (for llama.cpp and Ollama) or zeroed (full size, any family); may be several."
    ),
    "export_dtype": (
        "Dtype of the exported weights: float32 or bfloat16, and for gguf float16 or q8_0 as well; "
        "none: as they are in the model."
    ),
    "eval_text": "Texts to measure perplexity on: wikitext2, c4, ptb, or files. May be given several times.",
    "eval_text_column": "The column with the text, for evaluation texts that have several.",
    "tasks": "lm-eval tasks, separated by commas.",
    "task_dir": "A folder with lm-eval task files (YAML) of your own.",
    "task_data": (
        "A folder with the questions of piqa, winogrande, hellaswag, arc_easy or arc_challenge (TASK.jsonl), instead "
        "of the hub's."
    ),
    "log_samples": "Keep the model's answer to every question of the tasks, as a Parquet file.",
    "num_fewshot": "Worked examples shown before each question; none: the task's own number.",
    "limit": "Use only so many questions of each task.",
    "device": "auto, cpu, cuda or cuda:N; auto takes the GPU where there is one.",
    "dtype": "auto, float32 or bfloat16; auto is float32 on a CPU and bfloat16 on a GPU.",
    "batch_size": "Sequences in one forward pass; auto or none: chosen for the device. Changes no result.",
    "stock_compatible": (
        "Remove blocks in pairs, so that the result can be repacked into an unchanged model of its family, which every "
        "engine loads; an even number of blocks."
    ),
    "metric": (
        "What a block's removal is judged by: perplexity (the paper), or kl or js, the divergence of the model's "
        "predictions from the dense model's."
    ),
    "strategy": (
        "How removals are chosen: blockpruner (greedy, blocks), oneshot (blocks scored once), layers (greedy, whole "
        "layers), shortgpt, rm, laco or random."
    ),
    "strategy_seed": "Seed of strategy random: another one is another draw. The calibration set has a seed of its own.",
    "laco_layers_per_merge": "Strategy laco: how many layers become one in a merge, at most (C in its paper).",
    "laco_first_layer": "Strategy laco: the lowest layer that others are merged into (L), counted from 0.",
    "laco_last_layer": "Strategy laco: merging begins C layers below this one (H); none: the number of layers.",
    "laco_interval": "Strategy laco: how many layers lower it goes on after a merge (I).",
    "laco_threshold": (
        "Strategy laco: a merge stays while the last hidden states are this similar to the dense model's (T); "
        "lower removes more."
    ),
    "scorer": "sweep (all candidates in one walk) or plain (a forward pass for each). Changes no result.",
    "memory_budget": "How much of the device's memory a search may use, weights included: 8GiB, 80GB.",
    "compile": "auto, on or off: compile parts of the model for the search (GPU); auto where it saves time.",
    "executor": "local, or ray: split the search among workers on several GPUs or machines. Changes no result.",
    "workers": "How many workers of Ray; none: one for each GPU, or where there is none, for each machine.",
    "ray_address": "HOST:PORT of a Ray cluster that this machine is part of; none: start Ray on this machine alone.",
    "speed_batch_sizes": "How many sequences side by side to time, separated by commas.",
    "speed_prompt_tokens": "Lengths of the prompts to time, in tokens, separated by commas.",
    "speed_new_tokens": "Tokens to decode after each prompt.",
    "speed_repeats": "Repetitions of each measurement, in each of a model's two turns; the median counts.",
    "trust_remote_code": "Run the Python code that comes with the model. Only for models whose code you have read.",
    "name": "A name for the run, by which `show` and others find it.",
}
