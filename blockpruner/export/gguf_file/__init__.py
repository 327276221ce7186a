"""Format `gguf`: one file `model.gguf` for llama.cpp and what is built on it (Ollama, LM Studio)."""
