"""Continue texts with a pretrained model.

python example_text_completion.py
torchrun --nproc_per_node 1 example_text_completion.py --ckpt_dir llama-2-7b/ --tokenizer_path tokenizer.model
"""

from __future__ import annotations

from pathlib import Path

from llama import Llama, parallel
from llama.checkpoint import read_text
from llama.cli import script

BUNDLED = Path(__file__).resolve().parent / "models" / "small"

# The bundled model knows little stories and a few facts.
BUNDLED_PROMPTS = [
    "Once upon a time, there was a little fox named",
    "One sunny morning, Tom found a red ball",
    "The opposite of hot is",
    "1, 2, 3, 4,",
]

# A pretrained model continues a text: it does not follow orders. Show it the beginning of what you want.
PROMPTS = [
    "The most surprising thing about the deep sea is that",
    "In plain words, the second law of thermodynamics says that ",
    """A short note to the neighbours:

    Dear all,

    on Saturday we will""",
    """English to German:

    bread => Brot
    apple tree => Apfelbaum
    thunderstorm =>""",
]


def main(
    ckpt_dir: str = str(BUNDLED),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int | None = 64,
    max_batch_size: int = 4,
    prompts: list[str] | str | None = None,
    seed: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool | None = None,
    lora: str | list | None = None,
) -> None:
    """Print what the model writes after each prompt.

    Args:
        ckpt_dir: folder in Meta's or Hugging Face's layout, or a GGUF file; the bundled model by default
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir or one folder up
        temperature: 0 for greedy decoding; higher values give more varied text
        top_p: sample from the smallest set of tokens whose total probability reaches this
        max_seq_len: maximum number of tokens of prompt and answer together
        max_gen_len: maximum number of tokens of an answer
        max_batch_size: number of prompts that are answered at a time
        prompts: a list of prompts, or a text file with one prompt per line
        seed: the same seed gives the same texts
        device: cuda, mps or cpu; by default the first of them that is available
        dtype: bfloat16, float16 or float32; by default the checkpoint's, or float32 on CPUs that are faster in it
        quantize: int8 or int4, to quantize the weights while loading
        compile: whether to use the C++ backend on a CPU; by default for more than 50 MB of weights
        lora: folder of a PEFT LoRA adapter to merge; or a list such as '["A", "B"]' or '[("A", 0.5), ("B", 1)]'
    """
    texts = read_prompts(prompts, BUNDLED_PROMPTS if Path(ckpt_dir).expanduser().resolve() == BUNDLED else PROMPTS)
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
        lora=lora,
    )
    for begin in range(0, len(texts), max_batch_size):
        batch = texts[begin : begin + max_batch_size]
        results = llama.text_completion(batch, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
        if parallel.rank() == 0:
            for prompt, result in zip(batch, results, strict=True):
                print(prompt)
                print(f"> {result['generation']}")
                print("\n==================================\n")


def read_prompts(prompts: list[str] | str | None, default: list[str]) -> list[str]:
    if prompts is None:
        return default
    if isinstance(prompts, (list, tuple)):
        return list(prompts)
    path = Path(prompts).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"prompts {prompts!r} is neither a list such as '[\"Once upon\"]' nor a text file")
    return [line for line in read_text(path).split("\n") if line.strip()]


if __name__ == "__main__":
    script.run(main)
