from pathlib import Path

from setuptools import setup

here = Path(__file__).parent

setup(
    name="llama-reference",
    version="0.1.0",
    description="The reference inference library for Llama 2: minimal, readable PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["llama", "llama.backends"],
    package_data={"llama": ["py.typed"], "llama.backends": ["*.cpp"]},
    install_requires=(here / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require={
        "test": [
            *("pytest", "pytest-cov", "hypothesis", "pexpect", "ruff", "mypy"),
            *("transformers", "numpy", "prompt_toolkit"),
        ],
        "chat": ["prompt_toolkit"],
        "bench": ["transformers", "llama-cpp-python", "gguf", "numpy"],
    },
)
