"""Llama 2 inference: `from llama import Llama`."""

from .chat import Dialog
from .generation import Llama
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
