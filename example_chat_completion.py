"""Answer dialogs with a chat model.

torchrun --nproc_per_node 2 example_chat_completion.py
torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir llama-2-7b-chat/ --tokenizer_path tokenizer.model
"""

from __future__ import annotations

from pathlib import Path

from llama import Dialog, Llama, parallel
from llama.checkpoint import read_json
from llama.cli import script

BUNDLED = Path(__file__).resolve().parent / "models" / "small-chat"

# The bundled model was taught a handful of questions.
BUNDLED_DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What is the opposite of big?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is 3 + 4?"},
    ],
    [
        {"role": "user", "content": "My name is Tom."},
        {"role": "assistant", "content": "Nice to meet you, Tom!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Tell me a short story about a fox named Mia."}],
]

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "How do I keep basil alive on a window sill?"}],
    [
        {"role": "user", "content": "Name three rivers in Europe."},
        {"role": "assistant", "content": "The Danube, the Rhine and the Vistula."},
        {"role": "user", "content": "Which of them is the longest, and where does it end?"},
    ],
    [
        {"role": "system", "content": "Answer as a haiku."},
        {"role": "user", "content": "What is the sea like in winter?"},
    ],
    [
        {"role": "system", "content": "You are a patient teacher of ten-year-olds."},
        {"role": "user", "content": "Why do we see lightning before we hear the thunder?"},
    ],
]


def main(
    ckpt_dir: str = str(BUNDLED),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    max_gen_len: int | None = None,
    prompts: list[Dialog] | str | None = None,
    seed: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool | None = None,
    chat_format: str | None = None,
    lora: str | list | None = None,
) -> None:
    """Print the model's answer to each dialog.

    Args:
        ckpt_dir: folder in Meta's or Hugging Face's layout, or a GGUF file; the bundled chat model by default
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir or one folder up
        temperature: 0 for greedy decoding; higher values give more varied text
        top_p: sample from the smallest set of tokens whose total probability reaches this
        max_seq_len: maximum number of tokens of dialog and answer together
        max_batch_size: number of dialogs that are answered at a time
        max_gen_len: maximum number of tokens of an answer; by default as many as max_seq_len leaves
        prompts: a list of dialogs, or a JSON file with one; a dialog is a list of {"role": ..., "content": ...}
        seed: the same seed gives the same answers
        device: cuda, mps or cpu; by default the first of them that is available
        dtype: bfloat16, float16 or float32; by default the checkpoint's, or float32 on CPUs that are faster in it
        quantize: int8 or int4, to quantize the weights while loading
        compile: whether to use the C++ backend on a CPU; by default for more than 50 MB of weights
        chat_format: llama2, llama3 or template; by default the folder's template, else the tokenizer's format
        lora: folder of a PEFT LoRA adapter to merge; or a list such as '["A", "B"]' or '[("A", 0.5), ("B", 1)]'
    """
    dialogs = read_dialogs(prompts, BUNDLED_DIALOGS if Path(ckpt_dir).expanduser().resolve() == BUNDLED else DIALOGS)
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        chat_format=chat_format,
        lora=lora,
    )
    for begin in range(0, len(dialogs), max_batch_size):
        batch = dialogs[begin : begin + max_batch_size]
        results = llama.chat_completion(batch, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        if parallel.rank() == 0:
            for dialog, result in zip(batch, results, strict=True):
                for message in dialog:
                    print(f"{message['role'].capitalize()}: {message['content']}\n")
                answer = result["generation"]
                print(f"> {answer['role'].capitalize()}: {answer['content']}")
                print("\n==================================\n")


def read_dialogs(prompts: list[Dialog] | str | None, default: list[Dialog]) -> list[Dialog]:
    if prompts is None:
        return default
    if isinstance(prompts, (list, tuple)):
        return list(prompts)
    path = Path(prompts).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"prompts {prompts!r} is neither a list of dialogs nor a JSON file")
    return read_json(path, list)


if __name__ == "__main__":
    script.run(main)
