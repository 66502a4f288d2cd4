"""Make the bundled models from nothing: corpus, tokenizer, a base model and a chat model, on a CPU, from a seed.

    python tools/train_small.py --out models          # train, save, evaluate
    python tools/train_small.py --out models --eval_only

The result has the layout of Meta's download: tokenizer.model above the checkpoints, `small` as one shard and
`small-chat` as two. The chat model starts from the base model's weights. What is evaluated are the saved weights, which
are bfloat16, by greedy decoding of prompts that corpus.py keeps out of the training text. corpus.py also shows what the
models can talk about.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this repository's llama, installed or not

import corpus

from llama import Llama, ModelArgs, Tokenizer, Transformer, chat, checkpoint, devices, parallel
from llama.checkpoint import files

# vocab_size -1: the tokenizer decides, as in Llama 2's own files. Every width divides by two, for two shards.
PARAMS = {
    "dim": 128,
    "multiple_of": 128,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 4,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
VOCAB_SIZE = 1024
BATCH_TOKENS = 4096  # small batches learn most per minute here
BASE_CONTEXT, CHAT_CONTEXT = 256, 512  # tokens of a training row: any story fits in the one, a long dialog in the other
EVAL_ROWS = 32
IGNORE = -100  # what cross_entropy skips
CHAT_SHARE = 0.85  # of the documents that the chat model is trained on; the others keep its base knowledge alive

Example = tuple[list[int], list[int]]  # token ids, and for each the id that should come next


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and batches


def train_tokenizer(out: Path, seed: int) -> None:
    """A SentencePiece model with Llama 2's settings."""
    lines: list[str] = []
    for document in corpus.training_documents(seed, 12000, chat=0.5):
        if isinstance(document, str):
            lines += document.split("\n")
        else:
            system, *turns = ["", *document] if document[0]["role"] == "user" else document
            for user, answer in zip(turns[::2], turns[1::2], strict=True):
                lines.append(f"{chat.INST} {user['content']} {chat.END_INST} {answer['content']}")
            lines += [chat.SYS, system and system["content"], chat.END_SYS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(filter(None, lines)), model_writer=model, vocab_size=VOCAB_SIZE, model_type="bpe",
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=1,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model.getvalue())
    checkpoint.write_checklist(out / "tokenizer_checklist.chk", [out / "tokenizer.model"])


def text_example(tokenizer: Tokenizer, text: str) -> Example:
    ids = tokenizer.encode(text, bos=True, eos=True)
    return ids[:-1], ids[1:]


def dialog_example(tokenizer: Tokenizer, dialog: list[Any]) -> Example:
    """A conversation in Llama 2's format, of which only the answers are to be learned.

    The format puts a space between an answer and its EOS. The model is to end its answer without one, so the last token
    of each answer has EOS for its target and the space has none.
    """
    # A conversation's own ids are the history that a next message would have in front of it.
    last: list[Any] = [{"role": "user", "content": "-"}]
    ids = chat.encode_dialog(tokenizer, [*dialog, *last])[: -len(chat.encode_dialog(tokenizer, last))]
    targets = [IGNORE] * len(ids)
    for i, message in enumerate(dialog):
        if message["role"] == "assistant":
            start = len(chat.encode_dialog(tokenizer, dialog[:i]))
            end = ids.index(tokenizer.eos_id, start) - 1
            targets[start - 1 : end] = [*ids[start:end], tokenizer.eos_id]
    return ids, targets


def batches(tokenizer: Tokenizer, seed: int, share_of_chat: float, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of tokens and targets, both (B, context). A row begins with a document and may cut its last."""
    documents = corpus.training_documents(seed, sys.maxsize, share_of_chat)
    while True:
        rows = []
        for _ in range(BATCH_TOKENS // context):
            row: list[tuple[int, int]] = []
            while len(row) < context:
                document = next(documents)
                example = text_example if isinstance(document, str) else dialog_example
                row += zip(*example(tokenizer, document), strict=True)
            rows.append(row[:context])
        tokens, targets = torch.tensor(rows).unbind(-1)  # (B, context) each
        yield tokens, targets


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(model: Transformer, data: Iterator[tuple[Tensor, Tensor]], steps: int, peak: float) -> None:
    """AdamW with a warm-up of a twentieth of the steps and a cosine down to a hundredth of the peak."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    # The weights stay float32; matrix products are several times faster in bfloat16 on CPUs with instructions for it.
    fast = devices.choose_dtype(None, torch.device("cpu"), torch.bfloat16) is torch.bfloat16
    began = time.time()
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / (steps / 20)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        tokens, targets = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model(tokens)  # (B, context, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == steps - 1:
            print(f"  step {step + 1:5d}/{steps}  loss {loss.item():.4f}  {time.time() - began:6.0f} s", flush=True)


def new_model(vocab_size: int, **cache: int) -> Transformer:
    parallel.init_model_parallel()
    return Transformer(ModelArgs(**PARAMS | {"vocab_size": vocab_size, **cache}))  # type: ignore[arg-type]


def initialize(model: Transformer) -> None:
    """Weights that keep the scale of activations at this small width, in place of the large models' normal(0, 0.02).

    With these the models learn within 300 steps to carry a name through a story; with 0.02, where the layers' output
    drowns the small embeddings, not within 400.
    """
    for name, weight in model.named_parameters():
        if "tok_embeddings" in name:
            torch.nn.init.normal_(weight)
        elif weight.dim() == 2:
            into_residual = "wo." in name or "w2." in name
            torch.nn.init.normal_(weight, std=(weight.shape[1] * (2 * model.n_layers if into_residual else 1)) ** -0.5)


def save(model: Transformer, folder: Path, mp: int) -> None:
    checkpoint.save({name: t.bfloat16() for name, t in model.state_dict().items()}, folder, PARAMS, mp)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

Verdict = tuple[str, bool, str]  # row of the table, right or wrong, what was said


def load(out: Path, name: str) -> Llama:
    """A saved model in one process, however many shards it has; the rounded weights, float32 arithmetic."""
    tokenizer = Tokenizer(out / "tokenizer.model")
    model = new_model(tokenizer.n_words, max_batch_size=EVAL_ROWS, max_seq_len=CHAT_CONTEXT)
    shards = [files.read_shard(path) for path in checkpoint.shard_paths(out / name)]
    whole = dict(shards[0])
    for key in whole:
        if (dim := checkpoint.shard_dim(key)) is not None:
            whole[key] = torch.cat([shard[key] for shard in shards], dim)
    model.load_state_dict(whole)
    return Llama(model.eval(), tokenizer)


def in_batches(items: Iterable[Any], answer: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """Each item with its greedy generation by text_completion or chat_completion."""
    rest = iter(items)
    while part := list(islice(rest, EVAL_ROWS)):
        yield from zip(part, (result["generation"] for result in answer(part, temperature=0)), strict=True)


def judge_base(llama: Llama, rng: random.Random, count: int) -> Iterator[Verdict]:
    for prompt, text in in_batches(islice(corpus.story_prompts(rng), count), llama.text_completion):
        story = f"{prompt} {text}"  # decoding a completion drops its leading space
        for sentence in corpus.sentences(story):
            yield "story: sentences grammatical", corpus.grammatical(sentence), sentence
        yield "story: coherent as a whole", corpus.coherent(story), story
    facts = {prompt: (topic, answer) for topic, prompt, answer in corpus.fact_prompts(rng)}
    for prompt, text in in_batches(facts, llama.text_completion):
        topic, answer = facts[prompt]
        yield f"fact: {topic}", text.split("\n")[0] == answer.strip(), f"{prompt!r} -> {text!r}"


def judge_chat(llama: Llama, rng: random.Random, count: int) -> Iterator[Verdict]:
    dialogs = (corpus.dialog(rng, topic) for topic in corpus.CHAT_TOPICS for _ in range(count))
    for dialog, message in in_batches(dialogs, llama.chat_completion):
        right = corpus.right(dialog, message["content"])
        said = f"{[turn['content'] for turn in dialog]} -> {message['content']!r}"
        yield f"chat: {corpus.understand(dialog)[0]}", right, said
        yield f"system message: {'yes' if corpus.system_of(dialog) else 'no'}", right, ""


def report(verdicts: Iterable[Verdict], show_wrong: int) -> None:
    table: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for row, right, said in verdicts:
        table[row].append(right)
        if row.startswith(("fact: ", "chat: ")):
            table[row.split()[0] + " ALL"].append(right)
        if said and not right:
            wrong.append(said)
    for row, results in sorted(table.items()):
        print(f"  {row:30s} {100 * sum(results) / len(results):6.1f} %  of {len(results)}")
    for said in wrong[:show_wrong]:
        print(f"  wrong: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate the small bundled models.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "models")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base_steps", type=int, default=2500)
    parser.add_argument("--chat_steps", type=int, default=4000)
    parser.add_argument("--chat_only", action="store_true", help="keep the tokenizer and the base model in --out")
    parser.add_argument("--eval_only", action="store_true", help="evaluate the models in --out and train nothing")
    parser.add_argument("--eval_count", type=int, default=40, help="stories, and conversations of each topic")
    parser.add_argument("--show_wrong", type=int, default=5, help="how many mistakes of each model to print")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if not (args.eval_only or args.chat_only):
        train_tokenizer(args.out, args.seed)
        tokenizer = Tokenizer(args.out / "tokenizer.model")
        model = new_model(tokenizer.n_words, max_batch_size=0)
        initialize(model)
        size = sum(p.numel() for p in model.parameters())
        print(f"base model: {tokenizer.n_words} pieces, {size:,} parameters, {BATCH_TOKENS:,} tokens a step")
        train(model, batches(tokenizer, args.seed, 0.0, BASE_CONTEXT), args.base_steps, peak=3e-3)
        save(model, args.out / "small", mp=1)
    if not args.eval_only:
        tokenizer = Tokenizer(args.out / "tokenizer.model")
        model = new_model(tokenizer.n_words, max_batch_size=0)
        model.load_state_dict(files.read_shard(args.out / "small" / "consolidated.00.pth"))
        print("chat model, from the base model's saved weights")
        train(model, batches(tokenizer, args.seed + 1, CHAT_SHARE, CHAT_CONTEXT), args.chat_steps, peak=2e-3)
        save(model, args.out / "small-chat", mp=2)
    for name, judge in (("small", judge_base), ("small-chat", judge_chat)):
        print(f"{name}, greedy, prompts that were held out")
        report(judge(load(args.out, name), random.Random(args.seed), args.eval_count), args.show_wrong)


if __name__ == "__main__":
    main()
