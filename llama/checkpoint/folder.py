"""Checkpoint: weights in Meta's layout, Hugging Face's or a GGUF file. Any slice of a weight can be read."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..args import ModelArgs
from ..backends.quantized import Quantization, Quantized, Scheme, dequantize, scheme, stack
from ..gguf import is_gguf, read_gguf, split_files
from ..textfile import read_json, read_optional_json
from . import gguf, hf, hf_quantized
from .files import READABLE, File, open_file, schemes
from .load import Stored, read_parts, stored_tensors
from .meta import read_params, read_scheme, shard_paths
from .paths import NO_CONFIG, advice, listed
from .plan import shapes, shard_dim, slice_shape, slices

log = logging.getLogger(__name__)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Put a path before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Checkpoint:
    """A folder or GGUF file of weights, saved for any number of ranks: `params`, by Meta's keys, and any slice of any
    weight. Opening it reads only headers. FileNotFoundError or ValueError names the file and what is wrong with it."""

    files: Sequence[File]
    holders: dict[str, Sequence[File]]  # the files that hold a weight, in the order of ranks
    scheme: Quantization  # of weights that were quantized before they were saved
    positions: int | None = None  # the longest context, if the files say

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        params, config = folder / "params.json", folder / "config.json"
        if is_gguf(folder):
            self._open_gguf(folder)
        elif params.is_file() and (any(folder.glob("consolidated.*.pth")) or not config.is_file()):
            self._open_meta(params)
        elif config.is_file():
            self._open_hf(config)
        else:
            raise FileNotFoundError(f"no params.json or config.json in {folder}; {advice(folder, NO_CONFIG)}")

    def _open_meta(self, source: Path) -> None:
        self.layout, self.source = "meta", source
        self.params = read_params(source)
        self.scheme = read_scheme(self.params.pop("quantization", None), source)
        self.files = [open_file(path) for path in shard_paths(self.folder)]
        self.holders = {name: self.files for file in self.files for name in file.tensors}

    def _open_hf(self, source: Path) -> None:
        self.layout, self.source = "hf", source
        config = read_json(source)
        with named_errors(source):
            self.params = hf.params(config)
            quantization = hf_quantized.settings(config, self.folder)
        files = [open_file(path) for path in hf.weight_files(self.folder)]
        head_dim = self.params.get("head_dim") or self.params["dim"] // self.params["n_heads"]
        if quantization:
            with named_errors(self.folder):
                hf_quantized.join_parts(files, quantization)
        for file in files:
            file.head_dim = head_dim
        tied = bool(config.get("tie_word_embeddings")) and not self.params.get("n_labels")
        self._hold(files, hf.NAMES, tied, config.get("max_position_embeddings"))

    def _open_gguf(self, source: Path) -> None:
        self.layout, self.source = "gguf", source
        paths = split_files(source)
        headers = [read_gguf(path) for path in paths]
        keys = headers[0].keys
        if (count := keys.get("split.count", 1)) != len(paths):
            raise ValueError(f"{source} is one of {count} files; give the first by its whole name, ...-00001-of-...")
        with named_errors(source):
            self.params = gguf.params(keys)
            files = [gguf.open_gguf(path, header) for path, header in zip(paths, headers, strict=True)]
            if scaling := gguf.rope_scaling(keys, self.params, gguf.divisors(files)):
                self.params["rope_scaling"] = scaling
        self._hold(files, gguf.NAMES, True, keys.get("llama.context_length"))

    def _hold(self, files: Sequence[File], names: Mapping[str, str], tied: bool, positions: object) -> None:
        """Take files of whole weights, with the names of their layout. If `tied` and no file has the output matrix, it
        is the embeddings."""
        ours = {theirs: meta for meta, theirs in hf.names(self.params["n_layers"], names).items()}
        for file in files:
            file.tensors = {ours.get(name, name): entry for name, entry in file.tensors.items()}
        self.files, self.holders = files, {name: [file] for file in files for name in file.tensors}
        if tied and "output.weight" not in self.holders and "tok_embeddings.weight" in self.holders:
            self.holders["output.weight"] = [file] = self.holders["tok_embeddings.weight"]
            file.tensors["output.weight"] = file.tensors["tok_embeddings.weight"]
        self.scheme = schemes(files)
        self.positions = positions if type(positions) is int and positions > 0 else None

    def vocab_size(self) -> int:
        """The number of rows of the output matrix, or with a score head of the embeddings; 0 if the files lack it."""
        scored = bool(self.params.get("n_labels"))
        name = "tok_embeddings.weight" if scored else "output.weight"
        files = self.holders.get(name, [])[: 1 if scored else None]  # embeddings are split by columns
        return sum(math.prod(file.tensors[name].shape[:1]) for file in files if name in file.tensors)

    def args(self, n_words: int) -> ModelArgs:
        """The model's shape, with the vocabulary of a tokenizer of `n_words` pieces. ValueError or FileNotFoundError if
        the files do not fit it."""
        with named_errors(self.source):
            args = ModelArgs(**self.params)
        if self.layout == "hf" and args.vocab_size == self.vocab_size() > n_words:
            self.trim(n_words)
            args.vocab_size = n_words
        if args.vocab_size not in (-1, n_words):
            given = f"{self.source}: vocab_size {args.vocab_size}"
            raise ValueError(f"{given} differs from the tokenizer's {n_words} pieces")
        wq = self.files[0].tensors.get("layers.0.attention.wq.weight")
        present, saved = len(self.files), args.n_heads * args.head_dim // max(wq.shape[0], 1) if wq and wq.shape else 1
        if self.layout == "meta" and present < saved:
            lacking = listed(f"consolidated.{i:02d}.pth" for i in range(present, saved))
            raise FileNotFoundError(f"{self.folder} has {present} of {saved} shards; download {lacking}")
        if (size := self.vocab_size()) not in (0, n_words):
            raise ValueError(f"the tokenizer has {n_words} pieces and the weights in {self.folder} {size}: not a pair")
        args = dataclasses.replace(args, vocab_size=n_words, tie_word_embeddings=self.tied())
        self.check(args)
        return args

    def eos_ids(self, n_words: int) -> set[int]:
        """The ids below `n_words` that end an answer by Hugging Face's files, besides the tokenizer's own."""
        found: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            ids = read_optional_json(self.folder / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            found |= {id for id in ids if type(id) is int and 0 <= id < n_words}
        return found

    def labels(self) -> list[str]:
        """The names of a score head's labels; [] without such a head. ValueError if they do not fit the head."""
        if not (n_labels := self.params.get("n_labels", 0)):
            return []
        with named_errors(self.folder / "config.json"):
            labels = hf.labels(read_optional_json(self.folder / "config.json"), n_labels)
            if len(labels) != n_labels:
                raise ValueError(f"id2label or num_labels gives {len(labels)} labels; the score head has {n_labels}")
        return labels

    def pad_id(self, n_words: int) -> int | None:
        """pad_token_id of config.json, if it is below `n_words`. The tokenizer's own does not count."""
        id = read_optional_json(self.folder / "config.json").get("pad_token_id")
        return id if type(id) is int and 0 <= id < n_words else None

    def tied(self) -> bool:
        """Whether the output matrix is the embeddings, and not a copy of them."""
        output, embeddings = "output.weight", "tok_embeddings.weight"
        files = self.holders.get(output, [])
        return bool(files) and all(
            embeddings in file.tensors and file.tensors[output].offset == file.tensors[embeddings].offset
            for file in files
        )

    def trim(self, n_words: int) -> None:
        """Ignore rows of the vocabulary beyond the tokenizer's pieces, which are padding. ValueError names added tokens
        other than padding."""
        path = self.folder / "added_tokens.json"
        odd = [token for token, id in read_optional_json(path).items() if type(id) is not int or id >= n_words]
        if odd := [token for token in odd if "pad" not in token.lower()]:
            raise ValueError(f"{path} adds {listed(odd)} to the tokenizer's {n_words} pieces, which cannot be encoded")
        log.warning(
            "%s: the vocabulary has %d rows behind the tokenizer's %d tokens, which are left out",
            *(self.folder, self.vocab_size() - n_words, n_words),
        )
        for file in self.files:
            for name in {"tok_embeddings.weight", "output.weight"} & file.tensors.keys():
                entry = file.tensors[name]
                file.tensors[name] = entry._replace(shape=(n_words, *entry.shape[1:]))

    def check(self, args: ModelArgs) -> None:
        """Compare the files with the model's shape. ValueError names every tensor of a file that is missing,
        unexpected, misshapen, of an unreadable dtype, or of another dtype than in the first shard."""
        stored = stored_tensors(args, self.scheme if isinstance(self.scheme, Scheme) else None, torch.float32)
        for file in self.files:
            problems = self._problems(file, stored)
            if found := [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]:
                raise ValueError(f"{file.path} does not fit {self.source.name}: {'; '.join(found)}")
        if missing := [name for name in stored if name not in self.holders]:
            raise ValueError(f"{self.folder} does not fit {self.source.name}: missing: {listed(missing)}")
        norms = [file.read("norm.weight", 0, 0, args.dim) for file in self.holders["norm.weight"]]
        for file, norm in zip(self.files, norms, strict=False):
            if not torch.equal(norm, norms[0]):  # every shard of a model has the same norms
                raise ValueError(f"{file.path} and {self.files[0].path.name} are shards of different models")
        if self.layout == "meta":
            rows = [file.read("layers.0.attention.wq.weight", 0, 0, 1) for file in self.files]
            for file, row in zip(self.files[1:], rows[1:], strict=True):
                if torch.equal(row, rows[0]) and row.any():
                    raise ValueError(f"{file.path} and {self.files[0].path.name} are the same shard")

    def _problems(self, file: File, stored: Stored) -> dict[str, list[str]]:
        """What is wrong with a file -> the names of the tensors concerned."""
        first = self.files[0]
        # Each of Meta's shards has a slice of every weight. Each Hugging Face file has whole weights that no other has.
        expected = [name for name in stored if self.layout == "meta" or self.holders.get(name) == [file]]
        missing = [name for name in expected if name not in file.tensors]
        problems = defaultdict(list, {"missing": missing, "unexpected": []})  # are named first
        for name, (key, shape, dtype, _, packed) in file.tensors.items():
            whole, wanted = stored.get(name, (None, torch.float32))
            if whole is None:
                problems["unexpected"].append(key)
            elif name in expected and shape not in (allowed := self.slice_shapes(name, whole)):
                problems["misshapen"].append(f"{name} {shape} instead of {allowed[0]}")
            readable = dtype in READABLE if wanted == torch.float32 else dtype == wanted  # floats may be of any size
            if not readable and not (packed and len(shape) > 1):
                problems["of a dtype that cannot be read"].append(f"{name} {dtype}")
            if name in first.tensors and first.tensors[name].dtype != dtype:
                problems[f"of another dtype than in {first.path.name}"].append(f"{name} {dtype}")
        return problems

    def slice_shapes(self, name: str, whole: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that a file's slice of a weight may have. Embeddings are split by columns in Llama 2's files, by
        rows in Llama 3's, and in the same way in all shards."""
        shards, dim = len(self.holders[name]), shard_dim(name)
        if dim is None:
            return [whole]
        dims = [d for d in ((1, 0) if "tok_embeddings" in name else (dim,)) if whole[d] % shards == 0] or [dim]
        fit = [tuple(size // shards if i == dim else size for i, size in enumerate(whole)) for dim in dims]
        first = self.holders[name][0].tensors.get(name)
        return [first.shape] if first and first.shape in fit else fit

    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight that is not quantized; float16 if there is none. Norms of a GGUF
        file do not count: they are always in float32."""
        found = {
            entry.dtype
            for file in self.files
            for name, entry in file.tensors.items()
            if entry.dtype in READABLE and name.endswith(".weight") and not (self.layout == "gguf" and "norm" in name)
        }
        return functools.reduce(torch.promote_types, found or {torch.float16})

    def fingerprint(self, args: ModelArgs, tokenizer: Path) -> dict[str, str]:
        """What is equal for two folders of the same model, in any layout and number of shards: the parameters, and
        digests of the tokenizer (its file, or a GGUF file's keys) and of the weights (their dtype, the norms and a row
        of each layer)."""
        names = ["dim", "n_layers", "n_heads", "kv_heads", "head_dim", "ffn_hidden", "vocab_size", "norm_eps"]
        names += ["rope_theta", "rope_scaling", "n_labels"]
        dtype, digest = self.dtype(), hashlib.md5(f"{self.dtype()} {self.scheme}".encode(), usedforsecurity=False)
        for name, shape in shapes(args).items():
            whole = shard_dim(name) is None
            if whole or (name.endswith("wv.weight") and not self.scheme):
                part = self.read(name, shape, 0, shape[0] if whole else 1, dtype).contiguous()
                digest.update(ctypes.string_at(part.data_ptr(), part.nbytes))
        self.release()
        content = repr(read_gguf(tokenizer).keys).encode() if is_gguf(tokenizer) else tokenizer.read_bytes()
        return {
            "params": str({name: getattr(args, name) for name in names}),
            "tokenizer": hashlib.md5(content, usedforsecurity=False).hexdigest(),
            "weights": digest.hexdigest(),
        }

    def scheme_for(
        self,
        quantize: str | None,
        group_size: int | None,
        symmetric: bool = False,
        device: torch.device | None = None,
    ) -> Quantization:
        """The scheme to load to `device` in, or without one to convert to: the one asked for, or the one that the
        weights were saved in. ValueError if these differ."""
        asked = scheme(quantize, group_size, symmetric, device)
        own = self.scheme
        if asked and own:
            asked_for = asked.bits, own[1] if group_size is None else group_size
            if not isinstance(own, Scheme) or asked_for != own[:2] or symmetric > own.symmetric:
                instead = f"load it as it is, without int{asked.bits}, or give the original weights"
                raise ValueError(f"{self.folder} is quantized already, to {own}; it cannot become {asked}: {instead}")
        return own or asked

    def release(self) -> None:
        """Drop what was read from this process's resident memory; see `File.release`."""
        for file in self.files:
            file.release()

    def quantized(self, name: str, shape: tuple[int, ...], begin: int, end: int) -> Quantized | None:
        """A slice, as in `read`, of a matrix that was saved quantized; None for any other weight."""
        own = self.scheme.of(name) if self.scheme else None
        if own is None:
            return None
        file = self.holders[name][0]
        if file.tensors[name].packed:
            parts = file.unpacked(name, shard_dim(name) or 0, begin, end)
            return stack([part for part in parts if isinstance(part, Quantized)])
        return read_parts(self, name, shape, begin, end, own)

    def read(
        self, name: str, shape: Sequence[int], begin: int, end: int, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Rows or columns `begin` to `end`, counted along its `shard_dim`, of a weight whose whole shape is `shape`.
        A slice that is contiguous in one file, in this dtype, is returned as a view of the file, unless `out` is on a
        GPU. Any other is copied to `out`, or to a new tensor."""
        files, dim = self.holders[name], shard_dim(name)
        if files[0].tensors[name].packed:
            if out is None:
                out = torch.empty(slice_shape(name, shape, begin, end), dtype=dtype)
            row = 0
            for part in files[0].unpacked(name, dim or 0, begin, end):
                values = dequantize(part) if isinstance(part, Quantized) else part
                out[row : row + len(values)] = values
                row += len(values)
            self.release()  # the tensors of a matrix may be in several files
            return out
        if dim is None:
            parts, dim = [files[0].read(name, 0, begin, end)], 0
        elif len(files) > 1 and files[0].tensors[name].shape[dim] == shape[dim]:  # split along the other dimension
            parts, dim = [file.read(name, dim, begin, end) for file in files], 1 - dim
        else:
            plan = slices(shape[dim], len(files), begin, end)
            parts = [files[part.shard].read(name, dim, part.begin, part.begin + part.length) for part in plan]
        final = parts[0].dtype == dtype and (out is None or out.device.type == "cpu")
        if len(parts) == 1 and final and parts[0].is_contiguous():
            return parts[0]
        if out is None:
            out = torch.empty(slice_shape(name, shape, begin, end), dtype=dtype)
        for target, part in zip(out.split([part.shape[dim] for part in parts], dim), parts, strict=True):
            target.copy_(part)
        for file in files:
            file.release()
        return out
