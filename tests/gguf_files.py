"""GGUF files of random models, written with the package gguf."""

import gguf
import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from llama.backends.quantized import dequantize
from llama.checkpoint.blocks import from_blocks
from llama.checkpoint.gguf import NAMES
from llama.checkpoint.hf import names

TYPE = gguf.GGMLQuantizationType
SUPERBLOCKS = ("Q4_K", "Q5_K", "Q6_K")  # that the package reads and does not write


def random_blocks(kind, rows, columns, seed=0, size=0.15):
    """Blocks (rows, bytes) of random bytes, whose values have a magnitude of about `size`."""
    values, nbytes = gguf.GGML_QUANT_SIZES[TYPE[kind]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // values, nbytes), dtype=np.uint8)
    most = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127, "Q4_K": 500, "Q5_K": 1000, "Q6_K": 2000}[kind]
    d = (rng.uniform(0.5, 1.5, (rows, columns // values, 2)) * size / most).astype(np.float16)
    d[..., 1] *= {"Q4_1": -8, "Q5_1": -16}.get(kind, 8)
    at = slice(-2, None) if kind == "Q6_K" else slice(0, 4 if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2)
    blocks[..., at] = d.view(np.uint8)[..., : len(range(*at.indices(nbytes)))]
    return blocks.reshape(rows, -1)


def unpacked(kind, blocks):
    nbytes = gguf.GGML_QUANT_SIZES[TYPE[kind]][1]
    return from_blocks(kind, torch.from_numpy(blocks).unflatten(1, (-1, nbytes)))


def encoded(kind, weight, seed=0):
    """A matrix encoded in a GGUF type, and its decoded values, up to float16's rounding of scales."""
    if kind in SUPERBLOCKS:
        blocks = random_blocks(kind, *weight.shape, seed)
        return blocks, dequantize(unpacked(kind, blocks))
    data = gguf.quantize(weight.numpy(), TYPE[kind])
    return data, torch.from_numpy(gguf.dequantize(data, TYPE[kind]).astype(np.float32))


def add_tokens(writer, tokenizer):
    model = SentencePieceProcessor(model_file=str(tokenizer))
    ids = range(model.vocab_size())
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(id) for id in ids])
    writer.add_token_scores([model.get_score(id) for id in ids])
    writer.add_token_types([next((kind for asked, kind in kinds if asked(id)), 1) for id in ids])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())


def write(path, args, state, kind, tokenizer, tied=False, parts=0, divisors=None, **keys):
    """Write the GGUF file of a model, or a split one with `parts` tensors in each file. Its matrices are of one type,
    or of a type for each name. Returns the weights that the file stands for."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts)
    for name, value in {
        "context_length": 64, "embedding_length": args.dim, "block_count": args.n_layers,
        "feed_forward_length": args.ffn_hidden, "head_count": args.n_heads, "head_count_kv": args.kv_heads,
        "rope_dimension_count": args.head_dim, "layer_norm_rms_eps": args.norm_eps, "rope_freq_base": args.rope_theta,
        "vocab_size": args.vocab_size, **keys,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    add_tokens(writer, tokenizer)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    found = {}
    for seed, (meta, theirs) in enumerate(names(args.n_layers, NAMES).items()):
        if tied and meta == "output.weight":
            found[meta] = found["tok_embeddings.weight"]
        elif state[meta].dim() == 1:
            found[meta] = state[meta].float()
            writer.add_tensor(theirs, found[meta].numpy())
        else:
            own = kind(meta) if callable(kind) else kind
            data, found[meta] = encoded(own, state[meta].float(), seed)
            writer.add_tensor(theirs, data, raw_dtype=TYPE[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
