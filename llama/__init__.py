"""Llama inference: `from llama import Llama`."""

from .args import ModelArgs
from .chat import Dialog, encode_dialog, render_dialog
from .conversation import Chat
from .generation import Llama
from .infilling import infilling_prompt
from .model import Transformer
from .stream import Event, Stream
from .tokenizer import Tokenizer

__all__ = [
    "Chat",
    "Dialog",
    "Event",
    "Llama",
    "ModelArgs",
    "Stream",
    "Tokenizer",
    "Transformer",
    "encode_dialog",
    "infilling_prompt",
    "render_dialog",
]
