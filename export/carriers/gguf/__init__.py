"""Stock folders as GGUF files, which llama.cpp runs."""
