# A server on CPUs: docker build -t llama .
# On NVIDIA GPUs:   docker build -t llama --build-arg TORCH_INDEX=https://pypi.org/simple .
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The first start compiles kernels for the machine: C++ on CPUs, Triton's launchers on GPUs.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "torch>=2.11" --index-url ${TORCH_INDEX}
WORKDIR /app
COPY setup.py pyproject.toml requirements.txt README.md LICENSE ./
COPY llama llama
RUN pip install --no-cache-dir ".[server,hf]"

RUN useradd --create-home llama
USER llama
WORKDIR /home/llama
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "llama", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
