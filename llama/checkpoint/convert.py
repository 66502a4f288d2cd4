"""A checkpoint -> a new folder, in Meta's layout for any number of ranks, in Hugging Face's, or with a GGUF file.

One tensor of the source is in memory at a time (one layer when calibrating), and of the target one Hugging Face file
(Meta's are memory-mapped), so that the largest model converts on a small machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..args import ModelArgs
from ..backends.quantized import Scheme
from ..chat_template import template_of
from ..devices import dtype_name
from ..tokenizer import Tokenizer
from . import gguf_write, hf
from .calibrate import calibrated, windows
from .folder import Checkpoint
from .load import Stored, Weights, read_quantized, read_whole, stored_tensors
from .lora import with_lora
from .paths import find_tokenizer
from .plan import check_divides, shapes, shard_dim, slice_shape
from .tokenizer_write import files_of, tokenizer_keys
from .write import LOCK, blank_file, check_new, new_folder, shards_of, write_checklist, write_file, writing

HF_FILE = 2 * 10**9  # bytes of one model-0000n-of-0000m.safetensors, which are in memory together


class Job(NamedTuple):
    """A model, and the dtype and scheme to write it in."""

    checkpoint: Checkpoint
    weights: Weights  # the checkpoint's, or these with adapters
    args: ModelArgs
    dtype: torch.dtype
    scheme: Scheme | None = None
    search: bool = False
    text: Tensor | None = None  # to calibrate with, from `calibrate.windows`

    def score_head(self) -> dict[str, Any]:
        """The keys of config.json that describe a score head; {} without one."""
        if not self.args.n_labels:
            return {}
        names, pad_id = self.checkpoint.labels(), self.checkpoint.pad_id(self.args.vocab_size)
        named, numbers = {str(i): name for i, name in enumerate(names)}, {name: i for i, name in enumerate(names)}
        return {"architectures": [hf.SCORE_HEAD], "id2label": named, "label2id": numbers, "pad_token_id": pad_id}

    def stored(self) -> Stored:
        """The tensors of Meta's layout."""
        return stored_tensors(self.args, self.scheme, self.dtype)

    def size(self) -> int:
        """The bytes of all of these."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.stored().values())


def convert(
    source: Path,
    target: Path,
    to: str,
    mp: int,
    dtype: torch.dtype | None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    search: bool = False,
    text: Callable[[], Sequence[int]] | None = None,
    lora: Any = None,
) -> None:
    """Write the checkpoint in `source`, with the adapters of `lora`, to a new folder: `to` is meta, for `mp` ranks, or
    gguf, the matrices quantized or not, or hf. They are rounded to the nearest numbers, or with a `search` for scales,
    or calibrated on the ids that `text` returns, which is called after all other arguments have been checked.

    Raises FileExistsError for a `target` that exists, OSError when the disk is too small and ValueError for a model
    that cannot be divided into `mp` shards or quantized so, and for a text that is too short.
    """
    if to not in ("meta", "hf", "gguf"):
        raise ValueError(f"to is {to!r}; it must be meta, hf or gguf")
    target = Path(os.path.abspath(os.path.expanduser(target)))
    check_new(target)
    checkpoint = Checkpoint(source)
    tokenizer_path = find_tokenizer(source, tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    weights, args, _ = with_lora(checkpoint, checkpoint.args(tokenizer.n_words), lora)
    if text and checkpoint.scheme:
        raise ValueError(f"{source} is quantized already, to {checkpoint.scheme}; calibrate with the original weights")
    if to == "gguf" and quantize:  # as its blocks are
        group_size, symmetric = group_size or 32, quantize == "int4"
    loaded_as = checkpoint.scheme_for(quantize, group_size, symmetric)
    scheme = loaded_as if isinstance(loaded_as, Scheme) else None  # matrices of a GGUF file become floats
    job = Job(checkpoint, weights, args, dtype or checkpoint.dtype(), scheme, search)
    check_target(job, to, mp, text)
    files = files_of(tokenizer, tokenizer_path, source, to)
    if text:
        job = job._replace(text=windows(text(), args.vocab_size))
    with new_folder(target, job.size()) as folder:
        write(job, folder, to, mp, tokenizer, files)


def check_target(job: Job, to: str, mp: int, text: object) -> None:
    """ValueError for what a layout cannot hold."""
    if to == "meta":
        for key, (shape, _) in job.stored().items():
            check_divides(key, shape, mp)
        return
    if mp != 1:
        raise ValueError(f"mp is {mp}; it is the number of shards of meta, and means nothing for {to}")
    if to == "hf" and job.scheme:
        raise ValueError(f"Hugging Face's layout cannot hold {job.scheme}; write Meta's, or give an unquantized source")
    if to == "gguf":
        source = job.checkpoint.scheme
        if isinstance(source, Scheme):
            raise ValueError(f"{job.checkpoint.folder} is quantized, to {source}; write a GGUF file of the original")
        if job.args.n_labels:
            raise ValueError("a GGUF file cannot hold a score head; write hf or meta")
        if job.scheme and job.scheme not in gguf_write.WRITTEN:
            raise ValueError(f"a GGUF file cannot hold {job.scheme}; int8 and int4 are written in groups of 32")
        if text:
            raise ValueError("calibrate is for meta; a GGUF file is rounded to the nearest numbers")


def write(job: Job, folder: Path, to: str, mp: int, tokenizer: Tokenizer, files: Mapping[str, Any]) -> None:
    """Write all files of a layout: the tokenizer's `files`, the weights, and their md5 sums."""
    with tqdm(total=2 * job.size(), unit="B", unit_scale=True, disable=None) as bar:
        for name, content in files.items():
            write_file(folder / name, content)
        eos_ids = tokenizer.eos_ids | job.checkpoint.eos_ids(job.args.vocab_size)
        if to == "gguf":
            write_gguf(job, folder, tokenizer, eos_ids, bar)
        elif to == "meta":
            write_meta(job, folder, mp, bar)
            if eos_ids - Tokenizer(find_tokenizer(folder, None)).eos_ids:
                write_file(folder / "generation_config.json", {"eos_token_id": sorted(eos_ids)})
        else:
            write_hf(job, folder, bar, tokenizer.bos_id, sorted(eos_ids))
        written = sorted(file for file in folder.iterdir() if file.name != LOCK)
        write_checklist(folder / "checklist.chk", written, bar.update)


def write_meta(job: Job, folder: Path, mp: int, bar: tqdm) -> None:
    """params.json and `mp` shards."""
    quantization = {"quantization": job.scheme.params()} if job.scheme else {}
    scaling = job.args.rope_scaling
    scaled = {"use_scaled_rope": True} if scaling and scaling.rope_type == "llama3" else {}  # all that Meta reads of it
    words = {"vocab_size": job.args.vocab_size} if job.checkpoint.params.get("vocab_size", -1) > 0 else {}
    write_file(folder / "params.json", job.checkpoint.params | words | scaled | quantization)
    if head := job.score_head():
        write_file(folder / "config.json", head)
    # All shards are equally large, even if there are more shards than key-value heads.
    blank = {
        key: torch.empty(slice_shape(key, shape, 0, shape[shard_dim(key) or 0] // mp), dtype=dtype)
        for key, (shape, dtype) in job.stored().items()
    }
    if job.args.tie_word_embeddings and mp == 1 and not job.scheme:
        blank["output.weight"] = blank["tok_embeddings.weight"]  # one storage, as in Meta's files
    files = [blank_file(blank, folder / f"consolidated.{rank:02d}.pth") for rank in range(mp)]
    for key, tensor in tensors(job):
        for file, part in zip(files, shards_of(key, tensor, mp), strict=True):
            file[key].copy_(part)
        bar.update(tensor.nbytes)


def tensors(job: Job) -> Iterator[tuple[str, Tensor]]:
    """The names and values of the tensors of Meta's layout, each whole."""
    whole = shapes(job.args)
    matrices = {name: own for name in whole if job.scheme and (own := job.scheme.of(name))}
    for name, shape in whole.items():
        if name not in matrices:
            yield name, read_whole(job.weights, name, shape, job.dtype)
    if job.scheme and job.text is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rounded = calibrated(job.weights, job.args, job.scheme, job.text, device)
    else:
        rounded = (
            (name, read_quantized(job.weights, name, shape, 0, shape[shard_dim(name) or 0], matrices[name], job.search))
            for name, shape in whole.items()
            if name in matrices
        )
    for name, matrix in rounded:
        keys = matrices[name].stored(name, whole[name])
        yield from zip(keys, (part for part in matrix if part is not None), strict=True)


def write_hf(job: Job, folder: Path, bar: tqdm, bos: int, eos: Sequence[int]) -> None:
    """config.json, and one file of safetensors, or several with an index."""
    whole, names = shapes(job.args), hf.names(job.args.n_layers)
    if job.args.tie_word_embeddings:
        del whole["output.weight"]
    sizes = {name: torch.Size(shape).numel() * job.dtype.itemsize for name, shape in whole.items()}
    groups = in_files(sizes)
    index: dict[str, str] = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in group:
            tensor = read_whole(job.weights, name, whole[name], job.dtype)
            if hf.is_permuted(name):
                tensor = hf.to_halves(tensor, job.args.head_dim).contiguous()
            tensors[names[name]] = tensor
            bar.update(tensor.nbytes)
        with writing(folder / file, sum(sizes[name] for name in group)) as new:
            save_file(tensors, new, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    config = hf.config(job.args, dtype_name(job.dtype), job.checkpoint.positions)
    eos_ids = [*eos] if len(eos) > 1 else max(eos, default=None)
    ids = {"bos_token_id": bos if bos >= 0 else None, "eos_token_id": eos_ids}
    write_file(folder / "config.json", config | ids | job.score_head())
    write_file(folder / "generation_config.json", ids)
    if len(groups) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        write_file(folder / "model.safetensors.index.json", content)


def write_gguf(job: Job, folder: Path, tokenizer: Tokenizer, eos_ids: Iterable[int], bar: tqdm) -> None:
    """model.gguf, with the tokenizer and the chat template in it."""
    source, kinds = job.checkpoint, gguf_write.kinds_of(job.args, job.dtype, job.scheme)
    template, name = template_of(source.folder), source.folder.resolve().name
    keys = gguf_write.keys_of(job.args, kinds["layers.0.attention.wq.weight"], source.positions, name)
    keys |= tokenizer_keys(tokenizer, eos_ids)
    keys |= {} if template is None else {"tokenizer.chat_template": template}
    gguf_write.write_gguf(folder / "model.gguf", job.weights, job.args, keys, kinds, job.search, bar.update)


def in_files(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in groups of up to HF_FILE bytes. A larger tensor has a group of its own."""
    groups: list[list[str]] = []
    free = 0
    for name, size in sizes.items():
        if size > free:
            groups.append([])
            free = HF_FILE
        groups[-1].append(name)
        free -= size
    return groups
