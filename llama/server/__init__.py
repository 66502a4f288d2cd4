"""The OpenAI-compatible HTTP server: `python -m llama serve CKPT`. It needs the extra "server"."""
