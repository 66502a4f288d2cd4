"""Other libraries at the same work on the same weights, for `bench`: Hugging Face's transformers and llama.cpp.

Each is a function of what ours was loaded from -> `Run`. transformers has no part in quantization and computes with the
weights as they were; llama.cpp rounds them itself, to q8_0 or q4_0. Needs the extra `bench`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hf
from .backends.quantized import Scheme
from .bench import Run
from .checkpoint import Weights, shapes, shard_dim
from .model import ModelArgs

GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


class Source(NamedTuple):
    """What a model was loaded from, and as what."""

    weights: Weights
    args: ModelArgs
    device: torch.device
    dtype: torch.dtype
    scheme: Scheme | None = None

    def read(self, name: str) -> Tensor:
        """A whole weight, unquantized."""
        shape = shapes(self.args)[name]
        return self.weights.read(name, shape, 0, shape[shard_dim(name) or 0], self.dtype, self.device)


def transformers_model(source: Source) -> Any:
    import transformers

    args = source.args
    params = {key: value for key, value in dataclasses.asdict(args).items() if "max_" not in key and value is not None}
    config = transformers.LlamaConfig(**hf.config(params, args.ffn_hidden, args.vocab_size, "float32"))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {}
    for name, theirs in hf.names(args.n_layers).items():
        weight = source.read(name)
        state[theirs] = hf.to_halves(weight, args.head_dim) if hf.is_rotated(name) else weight
    model.load_state_dict(state, assign=True)
    with source.device:  # its frequencies are no weights and were made on the meta device too
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def transformers_eager(source: Source) -> Run:
    """With the growing cache that `generate` uses by default."""
    model = transformers_model(source)

    @torch.inference_mode()
    def run(ids: Tensor, tokens: int) -> Iterator[object]:
        ids, cache = ids.to(source.device), None
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield ids.tolist()

    return run


def transformers_compiled(source: Source) -> Run:
    """Compiled, with a static cache; once for each shape, before anything is measured."""
    import torch._dynamo.config
    from transformers import StaticCache

    model, caches = transformers_model(source), {}
    torch._dynamo.config.recompile_limit = 100  # of shapes; beyond it would run uncompiled
    forward = torch.compile(model.forward, dynamic=False)

    @torch.inference_mode()
    def run(ids: Tensor, tokens: int) -> Iterator[object]:
        ids = ids.to(source.device).clone()  # of this mode, as those that follow are: no compiling twice
        B, T = ids.shape
        if (B, T) not in caches:
            caches[B, T] = StaticCache(config=model.config, max_cache_len=source.args.max_seq_len)
        cache = caches[B, T]
        cache.reset()
        at = torch.arange(T, device=source.device)
        for _ in range(tokens):
            out = forward(ids, past_key_values=cache, position_ids=at[None].expand(B, -1), logits_to_keep=1)
            ids, at = out.logits[:, -1:].argmax(-1), at[-1:] + 1
            yield ids.tolist()

    return run


# What llama.cpp is given and gives: row -> where its tokens begin, and they; the likeliest id after each row's last.
Rows = Mapping[int, tuple[int, list[int]]]


def llama_cpp_decoder(source: Source) -> Callable[[Rows], list[int]]:
    """llama.cpp, with as many threads, its own cache of float16 and its own rounding. When row 0 begins anew it forgets
    all of them."""
    import llama_cpp as lib
    import numpy as np

    folder = tempfile.TemporaryDirectory()
    path = write_gguf(source, Path(folder.name) / "model.gguf")
    quiet = lib.llama_log_callback(lambda *args: None)
    lib.llama_log_set(quiet, ctypes.c_void_p())
    args, model = source.args, lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx = args.max_batch_size * args.max_seq_len
    options.n_seq_max, options.n_batch, options.n_ubatch = args.max_batch_size, 2048, 512
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, options)
    memory = lib.llama_get_memory(context)

    def decode(rows: Rows) -> list[int]:
        assert folder and quiet  # they live as long as this function
        batch = lib.llama_batch_init(sum(len(tokens) for _, tokens in rows.values()), 0, 1)
        last = []
        for row, (begin, tokens) in rows.items():
            if begin == row == 0:
                lib.llama_memory_clear(memory, True)
            for i, token in enumerate(tokens):
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, begin + i, 1, row
                batch.logits[n] = i == len(tokens) - 1
                batch.n_tokens = n + 1
            last.append(batch.n_tokens - 1)
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama.cpp did not decode")
        lib.llama_batch_free(batch)
        logits = (lib.llama_get_logits_ith(context, n) for n in last)
        return [int(np.ctypeslib.as_array(row, (args.vocab_size,)).argmax()) for row in logits]

    return decode


def llama_cpp(source: Source) -> Run:
    decode = llama_cpp_decoder(source)

    def run(ids: Tensor, tokens: int) -> Iterator[object]:
        found = [id for row, prompt in enumerate(ids.tolist()) for id in decode({row: (0, prompt)})]
        yield found
        for begin in range(ids.shape[1], ids.shape[1] + tokens - 1):
            found = decode({row: (begin, [id]) for row, id in enumerate(found)})
            yield found

    return run


def write_gguf(source: Source, path: Path) -> Path:
    """llama.cpp's file of the model; its vocabulary has numbers for texts."""
    import gguf

    args = source.args
    kinds = gguf.GGMLQuantizationType
    kind = kinds.F32 if source.dtype == torch.float32 else kinds.F16
    if source.scheme:
        kind = kinds.Q8_0 if source.scheme.bits == 8 else kinds.Q4_0
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_embedding_length(args.dim)
    file.add_block_count(args.n_layers)
    file.add_feed_forward_length(args.ffn_hidden)
    file.add_head_count(args.n_heads)
    file.add_head_count_kv(args.kv_heads)
    file.add_layer_norm_rms_eps(args.norm_eps)
    file.add_rope_dimension_count(args.head_dim)
    file.add_rope_freq_base(args.rope_theta)
    file.add_vocab_size(args.vocab_size)
    file.add_tokenizer_model("llama")
    file.add_token_list([b"<unk>", b"<s>", b"</s>", *(str(i).encode() for i in range(3, args.vocab_size))])
    file.add_token_scores([0.0] * args.vocab_size)
    file.add_token_types([2, 3, 3] + [1] * (args.vocab_size - 3))
    for name in shapes(args):
        *layer, stem = (
            name.removesuffix(".weight").replace("layers.", "").split(".", 1) if "layers" in name else [name[:-7]]
        )
        theirs = ".".join([*(f"blk.{i}" for i in layer), GGUF_NAMES[stem], "weight"])
        values = source.read(name).float().cpu().numpy()
        if values.ndim == 1:
            file.add_tensor(theirs, values)
        else:
            file.add_tensor(theirs, gguf.quants.quantize(values, kind), raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


PEERS: Mapping[str, Callable[[Source], Run]] = {
    "transformers": transformers_eager,
    "transformers-compiled": transformers_compiled,
    "llama.cpp": llama_cpp,
}
