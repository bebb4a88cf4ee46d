# nanorlhf on an NVIDIA GPU, with the versions of scripts/locks/gpu.txt:
#   docker build -t nanorlhf .
#   docker run --rm --gpus all --ipc host -v "$PWD:/workspace" nanorlhf grpo --recipe tiny
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# A compiler and Python's headers: Triton builds its launchers when a model first runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# vLLM and torch (several GB) in a layer of their own, which only another lock renews.
COPY scripts/locks/gpu.txt /opt/gpu.txt
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint /opt/gpu.txt vllm
COPY . /opt/nanorlhf
RUN pip install --no-cache-dir --constraint /opt/gpu.txt "/opt/nanorlhf[gpu]"

USER ubuntu
WORKDIR /workspace
ENTRYPOINT ["nanorlhf"]
CMD ["--help"]
