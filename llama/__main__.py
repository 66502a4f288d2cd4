"""python -m llama COMMAND: thin commands over the rooms of this package; --help tells more."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
from fire.decorators import SetParseFns
from tqdm import tqdm

from . import bench as benchmark
from . import parallel, script
from .backends.quantized import Scheme, scheme
from .checkpoint import Checkpoint, Weights, check_path, digest, find_tokenizer, shapes
from .convert import convert as write
from .generation import Llama
from .memory import available, footprint, shortage
from .model import ModelArgs
from .peers import PEERS, Source
from .scoring import perplexity as sliding
from .terminal import converse
from .tokenizer import Tokenizer

SUMS = ("*.chk", "*.md5", "*.sha256", "*SUMS")  # names of lists
KINDS = {32: "md5", 64: "sha256"}  # by the length of a sum


@SetParseFns(dst=str)  # or a folder named 2024_01 would become 202401
def convert(
    src: str,
    dst: str,
    to: str = "meta",
    mp: int = 1,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    quantize: str | None = None,
    group_size: int = 64,
    search: bool = True,
) -> None:
    """Write the checkpoint in SRC, in either layout, to the new folder DST.

    Args:
        src: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        dst: the folder to make; it gets its name when it is complete
        to: meta or hf, the layout to write
        mp: number of shards, for meta
        dtype: bfloat16, float16 or float32; by default as in src
        tokenizer_path: tokenizer.model; by default the one in src or one folder up
        quantize: int8 or int4, for meta: the matrices are rounded, and loaded as they are rounded
        group_size: columns of a group of int4: 32, 64 or 128
        search: look for the best range of each group of int4, which takes ten times as long as rounding
    """
    folder = check_path(src, "src", "folder")
    kind = None if dtype is None else parallel.as_dtype(dtype)
    tokenizer = find_tokenizer(folder, tokenizer_path)
    write(folder, Path(str(dst)), to, mp, kind, tokenizer, quantize, group_size, search)


def inspect(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    world_size: int | None = None,
    dtype: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    device: str | None = None,
    verify: bool = False,
    quantize: str | None = None,
    group_size: int = 64,
) -> None:
    """Tell what a checkpoint is, what it needs and how to run it, from headers alone.

    Args:
        ckpt_dir: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir or one folder up
        world_size: number of ranks; by default the fewest on which it fits
        dtype: bfloat16, float16 or float32; by default what Llama.build would choose
        max_seq_len: tokens of prompt and answer together, at most
        max_batch_size: prompts at a time, at most
        device: cuda, mps or cpu; the first of them that there is by default
        quantize: int8 or int4, to tell what it needs when loaded so
        group_size: columns of a group of int4: 32, 64 or 128
        verify: read everything and compare it with the lists of md5 or sha256 sums in the folder and the tokenizer's
    """
    folder = check_path(ckpt_dir, "ckpt_dir", "folder")
    checkpoint = Checkpoint(folder)
    path, missing = None, ""
    try:
        path = find_tokenizer(folder, tokenizer_path)
    except FileNotFoundError as error:
        missing = f"missing: {error}"
    args = checkpoint.args(checkpoint.vocab_size() if path is None else Tokenizer(path).n_words)
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    where = parallel.choose_device(device)
    kind = parallel.choose_dtype(dtype, where, checkpoint.dtype())
    rounding = checkpoint.scheme_for(quantize, group_size)
    free = available(where)
    ranks = [n for n in (1, 2, 4, 8) if divides(args, n)]
    if world_size is not None:
        if type(world_size) is not int or world_size < 1 or not divides(args, world_size):
            raise ValueError(f"world_size {world_size!r} does not divide the model; {', '.join(map(str, ranks))} do")
        ranks = [world_size]
    each = {n: free // n if where.type == "cpu" else free for n in ranks}  # ranks on a CPU share its memory
    fitting = [n for n in ranks if shortage(footprint(args, n, kind, rounding), each[n], where, n) is None]
    chosen = (fitting or ranks[-1:])[0]
    needed = footprint(args, chosen, kind, rounding)
    rows = {
        "layout": {"meta": "Meta's", "hf": "Hugging Face's"}[checkpoint.layout],
        "parameters": f"{sum(math.prod(shape) for shape in shapes(args).values()):,}",
        "model": f"{args.n_layers} layers, dim {args.dim}, {args.n_heads} heads ({args.kv_heads} key-value), "
        f"FFN {args.ffn_hidden}, vocabulary {args.vocab_size}",
        "files": f"{len(checkpoint.files)}, in {checkpoint.scheme or name(checkpoint.dtype())}",
        "tokenizer": path or missing,
        "each rank": f"{needed} in {rounding or name(kind)}, "
        f"{max_batch_size} x {max_seq_len} positions, {chosen} rank(s)",
        "here": f"{where} with {each[chosen] / 1e9:.2f} GB free for each rank",
        "fits": shortage(needed, each[chosen], where, chosen) or "yes",
        "run": f"torchrun --nproc_per_node {chosen} example_text_completion.py --ckpt_dir {quote(str(folder))} "
        f"--tokenizer_path {quote(str(path or 'TOKENIZER.MODEL'))} "
        f"--max_seq_len {max_seq_len} --max_batch_size {max_batch_size}",
    }
    for title, value in rows.items():
        print(f"{title:>10}: {value}")
    if verify:
        lists = {file for pattern in SUMS for file in folder.glob(pattern)}
        beside = (path or folder / "tokenizer.model").parent / "tokenizer_checklist.chk"
        if beside.is_file():
            lists.add(beside)
        if not lists:
            raise FileNotFoundError(f"no list of sums to verify in {folder}: none of {', '.join(SUMS)}")
        verify_sums(sorted(lists), [file.path for file in checkpoint.files])


def divides(args: ModelArgs, ranks: int) -> bool:
    """Whether a model can be shared by this many ranks."""
    whole = args.n_heads % ranks == args.ffn_hidden % ranks == args.vocab_size % ranks == args.dim % ranks == 0
    return whole and (args.kv_heads % ranks == 0 or ranks % args.kv_heads == 0)


def bench(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    shape: str = "110M",
    dtype: str | None = None,
    device: str | None = None,
    batches: int | tuple[int, ...] = (1, 8, 32),
    prompts: int | tuple[int, ...] = (128, 512, 2048),
    tokens: int = 32,
    repeats: int = 5,
    compare: str | tuple[str, ...] = (),
    quantize: str | None = None,
    group_size: int = 64,
    compile: bool = False,
) -> None:
    """Measure tokens per second, as a fraction of what the machine can do and beside other libraries.

    Args:
        ckpt_dir: a checkpoint in either layout; by default random weights of `shape`
        tokenizer_path: tokenizer.model of the checkpoint; by default the one in ckpt_dir or one folder up
        shape: 110M, 1.1B, 7B, 13B or 70B
        dtype: bfloat16, float16 or float32; by default what Llama.build would choose, for a shape of bfloat16 weights
        device: cuda, mps or cpu; the first of them that there is by default
        batches: how many rows to decode at once, one or several numbers
        prompts: lengths of prompts to prefill, one or several numbers
        tokens: how many to decode, after a prompt of 128
        repeats: how often each is measured
        compare: one or several of transformers, transformers-compiled and llama.cpp, to be measured in turn on the same
            weights (one rank only)
        quantize: int8 or int4
        group_size: columns of a group of int4: 32, 64 or 128
        compile: to multiply and decode on a CPU in C++
    """
    peers = compare.split(",") if isinstance(compare, str) else [*compare]  # a point makes one text of a list
    many = {"batches": batches, "prompts": prompts, "tokens": tokens, "repeats": repeats}
    sizes = {what: [value] if isinstance(value, int) else [*value] for what, value in many.items()}
    for what, values in sizes.items():
        if not all(type(value) is int and value > (what == "tokens") for value in values):
            raise ValueError(f"{what} is {many[what]!r}; it must be of numbers from {1 + (what == 'tokens')} on")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise ValueError(f"compare names {', '.join(map(str, unknown))}; known are {', '.join(PEERS)}")
    if shape not in benchmark.SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(benchmark.SHAPES)}")
    parallel.init_model_parallel()
    if peers and parallel.world_size() > 1:
        raise ValueError("compare measures on one rank only")
    cases = [benchmark.Case(1, length, 1) for length in sizes["prompts"]]
    cases += [benchmark.Case(batch, 128, tokens) for batch in sizes["batches"]]
    where = parallel.choose_device(device)
    parallel.use(where)
    room = {
        "max_seq_len": max(case.prompt + case.tokens for case in cases),
        "max_batch_size": max(case.batch for case in cases),
    }
    began = time.perf_counter()
    if ckpt_dir is None:
        args = ModelArgs(**benchmark.SHAPES[shape], vocab_size=32000, **room)
        kind = parallel.choose_dtype(dtype, where, torch.bfloat16)
        rounding = scheme(quantize, group_size)
        fit(args, where, kind, rounding)
        weights: Weights = benchmark.RandomWeights(where, rounding)
    else:
        folder = check_path(ckpt_dir, "ckpt_dir", "folder")
        weights = checkpoint = Checkpoint(folder)
        args = replace(checkpoint.args(Tokenizer(find_tokenizer(folder, tokenizer_path)).n_words), **room)
        kind = parallel.choose_dtype(dtype, where, checkpoint.dtype())
        rounding = checkpoint.scheme_for(quantize, group_size)
        fit(args, where, kind, rounding)
        if peers and checkpoint.scheme:
            raise ValueError(f"compare needs weights that are not quantized yet, as those in {folder} are")
    model = benchmark.loaded(weights, args, where, kind, rounding, compile)
    benchmark.synchronize(where)
    rounded = None if rounding is None else str(rounding)
    facts = {
        "model": str(ckpt_dir or shape),
        "dtype": name(kind),
        "quantize": rounded,
        "compile": compile,
        "load_s": time.perf_counter() - began,
    }
    with redirect_stdout(None) if parallel.rank() else nullcontext():
        source = Source(weights, args, where, kind, rounding)
        benchmark.bench(model, cases, repeats, {peer: PEERS[peer](source) for peer in peers}, facts)


def chat(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    system: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    max_seq_len: int = 2048,
    seed: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int = 64,
    prompt_lookup: int = 0,
    compile: bool = False,
) -> None:
    """Talk to a chat model in the terminal, or pipe one prompt a line into it; /help there tells more.

    Args:
        ckpt_dir: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir or one folder up
        system: instructions that begin the conversation
        temperature: 0 for always the likeliest token
        top_p: probability of the tokens that are drawn from
        max_gen_len: tokens of an answer, at most
        max_seq_len: tokens of the conversation that the model sees, at most
        seed: what makes another run draw the same
        device: cuda, mps or cpu; the first of them that there is by default
        dtype: bfloat16, float16 or float32; by default what Llama.build would choose
        quantize: int8 or int4
        group_size: columns of a group of int4: 32, 64 or 128
        prompt_lookup: guesses to try with each step, which helps where answers repeat what was said
        compile: to be faster on a CPU, with rounded weights above all, after g++ has worked for twenty seconds, once
    """
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=1,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        group_size=group_size,
        compile=compile,
    )
    options = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "prompt_lookup": prompt_lookup}
    converse(llama, system, **options)


@SetParseFns(file=str)
def perplexity(
    file: str,
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    window: int = 512,
    stride: int | None = None,
    batch: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    group_size: int = 64,
) -> None:
    """Tell the perplexity of the text in FILE, each token seen with those before it in a sliding window.

    Args:
        file: a text in UTF-8
        ckpt_dir: folder of params.json and consolidated.*.pth, or of config.json and *.safetensors
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir or one folder up
        window: tokens of a window
        stride: tokens from one window to the next; by default half of a window
        batch: windows at a time
        device: cuda, mps or cpu; the first of them that there is by default
        dtype: bfloat16, float16 or float32; by default what Llama.build would choose
        quantize: int8 or int4
        group_size: columns of a group of int4: 32, 64 or 128
    """
    step = window // 2 if stride is None else stride
    if type(window) is not int or type(step) is not int or not 0 < step < window:
        raise ValueError(f"window is {window!r} and stride {step!r}; they must be whole, 0 < stride < window")
    text = check_path(file, "file", "file").read_text(encoding="utf-8")
    llama = Llama.build(
        ckpt_dir, tokenizer_path, window, batch, device=device, dtype=dtype, quantize=quantize, group_size=group_size
    )
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    if len(ids) < 2:
        raise ValueError(f"{file} is empty")
    with tqdm(total=len(ids) - 1, unit="token", disable=True if parallel.rank() else None, leave=False) as bar:
        found, count = sliding(llama.model, ids, window, step, bar.update)
    if parallel.rank() == 0:
        print(f"perplexity {found:.4f} of {count:,} tokens, in windows of {window} every {step}")


def fit(args: ModelArgs, where: torch.device, dtype: torch.dtype, rounding: Scheme | None) -> None:
    """MemoryError for a model that this machine has no room for."""
    ranks = parallel.world_size()
    if problem := shortage(footprint(args, ranks, dtype, rounding), available(where), where, ranks):
        raise MemoryError(problem)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def verify_sums(lists: Sequence[Path], needed: Sequence[Path]) -> None:
    """Compare the files that lists name with their md5 or sha256 sums, told apart by their length. ValueError names the
    files that are missing, differ or are `needed` and in no list, and lines that are none of either."""
    wanted = []
    for path in lists:
        for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines()):
            if not (match := re.fullmatch(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64}) [ *]?(.+)", line.strip())):
                raise ValueError(f"{path}: {line!r} is no line of md5sum or sha256sum")
            wanted.append((path.parent / match[2].strip(), match[1].lower()))
    missing = [file for file, _ in wanted if not file.is_file()]
    there = [(file, sum) for file, sum in wanted if file not in missing]
    total = sum(file.stat().st_size for file, _ in there)
    with tqdm(desc="verifying", total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        wrong = [file for file, sum in there if digest(file, KINDS[len(sum)], bar.update) != sum]
    unlisted = [file for file in needed if file not in [listed for listed, _ in wanted]]
    problems = {"missing": missing, "other than their sums say": wrong, "in no list of sums": unlisted}
    if told := [f"{what}: {', '.join(map(str, files))}" for what, files in problems.items() if files]:
        raise ValueError(f"{'; '.join(told)}; download again")
    print(f"{'verified':>10}: {', '.join(file.name for file, _ in there)}")


if __name__ == "__main__":
    script.run({"bench": bench, "chat": chat, "convert": convert, "inspect": inspect, "perplexity": perplexity})
