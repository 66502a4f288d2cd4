"""Other libraries on the same weights, for compare.py: Hugging Face's transformers and llama.cpp.

Each is a function that takes the source of a model and returns a `Run`. With a quantization scheme, transformers still
computes with the unquantized weights, and llama.cpp quantizes them itself, to q8_0 or q4_0. Needs the extra `bench`.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.backends.quantized import Scheme
from llama.checkpoint import Checkpoint, hf, shapes, shard_dim
from llama.checkpoint.gguf import DTYPES, NAMES
from llama.checkpoint.gguf_write import BY_NAME, keys_of
from llama.cli.measure import Run, Source
from llama.gguf import aligned, header_bytes, is_gguf


def whole(source: Source, name: str) -> Tensor:
    """A whole weight, unquantized."""
    shape = shapes(source.args)[name]
    return source.weights.read(name, shape, 0, shape[shard_dim(name) or 0], source.dtype).to(source.device)


def transformers_model(source: Source) -> Any:
    import transformers

    args = source.args
    config = transformers.LlamaConfig(**hf.config(args, "float32"))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state, names = {}, hf.names(args.n_layers)
    for name in shapes(args):
        weight = whole(source, name)
        state[names[name]] = hf.to_halves(weight, args.head_dim) if hf.is_permuted(name) else weight
    model.load_state_dict(state, assign=True)
    with source.device:  # its frequencies are not in the state dict, and are on the meta device still
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def transformers_eager(source: Source) -> Run:
    """Eager, with the growing cache that `generate` uses by default."""
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
    """Compiled once for each shape during warm-up, with a static cache."""
    import torch._dynamo.config
    from transformers import StaticCache

    model, caches = transformers_model(source), {}
    torch._dynamo.config.recompile_limit = 100  # shapes; those beyond would run uncompiled
    forward = torch.compile(model.forward, dynamic=False)

    @torch.inference_mode()
    def run(ids: Tensor, tokens: int) -> Iterator[object]:
        ids = ids.to(source.device).clone()  # an inference tensor, as the next steps have: compiled once
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


# What llama.cpp decodes: row -> the position of its first token, and its tokens.
Rows = Mapping[int, tuple[int, list[int]]]


@cache
def silence() -> object:
    """Turn off llama.cpp's log. It keeps the address of the callback, so that the callback must stay alive."""
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *args: None)
    lib.llama_log_set(quiet, ctypes.c_void_p())
    return quiet


def llama_cpp_decoder(source: Source, narrow: str = "F16") -> Callable[[Rows], list[int]]:
    """llama.cpp with the same number of threads, a float16 cache and its own quantization: rows -> the argmax after
    each row's last token. The cache is cleared when row 0 starts at position 0."""
    import llama_cpp as lib
    import numpy as np

    folder = tempfile.TemporaryDirectory()
    saved = source.weights.source if isinstance(source.weights, Checkpoint) else Path()
    path = saved if is_gguf(saved) else write_gguf(source, Path(folder.name) / "model.gguf", narrow)
    silence()
    if isinstance(source.scheme, Scheme):  # as llama-quantize does: with q4_0 the output matrix becomes q6_K
        how, original = lib.llama_model_quantize_default_params(), path
        how.ftype = lib.LLAMA_FTYPE_MOSTLY_Q8_0 if source.scheme.bits == 8 else lib.LLAMA_FTYPE_MOSTLY_Q4_0
        path = path.with_name("quantized.gguf")
        if lib.llama_model_quantize(str(original).encode(), str(path).encode(), how):
            raise RuntimeError("llama.cpp did not quantize")
        original.unlink()
    args, model = source.args, lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    options = lib.llama_context_default_params()
    options.n_ctx = args.max_batch_size * args.max_seq_len
    options.n_seq_max, options.n_batch, options.n_ubatch = args.max_batch_size, options.n_ctx, 512
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, options)
    memory = lib.llama_get_memory(context)

    def decode(rows: Rows) -> list[int]:
        assert folder  # it lives as long as this function
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


def llama_cpp(source: Source, narrow: str = "F16") -> Run:
    decode = llama_cpp_decoder(source, narrow)

    def run(ids: Tensor, tokens: int) -> Iterator[object]:
        found = [id for row, prompt in enumerate(ids.tolist()) for id in decode({row: (0, prompt)})]
        yield found
        for begin in range(ids.shape[1], ids.shape[1] + tokens - 1):
            found = decode({row: (begin, [id]) for row, id in enumerate(found)})
            yield found

    return run


def write_gguf(source: Source, path: Path, narrow: str = "F16") -> Path:
    """Write the model as a GGUF file, in F32 or, for 16-bit weights, in `narrow`. Its tokens are numbers as text."""
    args, theirs = source.args, hf.names(source.args.n_layers, NAMES)
    dtype = "F32" if source.dtype == torch.float32 and not source.scheme else narrow
    types = {name: BY_NAME[dtype if len(shape) > 1 else "F32"] for name, shape in shapes(args).items()}
    keys = keys_of(args, BY_NAME[dtype], None, "model") | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *map(str, range(3, args.vocab_size))],
        "tokenizer.ggml.scores": [0.0] * args.vocab_size,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (args.vocab_size - 3),
    }
    with path.open("wb") as file:
        file.write(header_bytes(keys, {theirs[name]: (types[name], shape) for name, shape in shapes(args).items()}))
        for name, kind in types.items():
            file.seek(aligned(file.tell()))
            file.write(whole(source, name).cpu().to(DTYPES[kind.name]).view(torch.uint8).numpy().tobytes())
        file.truncate(aligned(file.tell()))
    return path


PEERS: Mapping[str, Callable[[Source], Run]] = {
    "transformers": transformers_eager,
    "transformers-compiled": transformers_compiled,
    "llama.cpp": llama_cpp,
    "llama.cpp-bf16": partial(llama_cpp, narrow="BF16"),  # faster where a CPU multiplies it
}
