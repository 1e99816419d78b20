# A small image for processors:
#   docker build -t nanochat .
#   docker run -it -v nanochat:/runs nanochat speedrun
# For an NVIDIA GPU, take PyPI's torch, which brings CUDA along, and give the container the GPU:
#   docker build -t nanochat-gpu --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run -it --gpus all -v nanochat:/runs nanochat-gpu speedrun
FROM python:3.13-slim AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
WORKDIR /clone
COPY pyproject.toml README.md LICENSE ./
COPY rustbpe rustbpe
COPY nanochat nanochat
COPY nbs nbs
COPY lessons lessons
# maturin downloads Rust, because there is none
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.13-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# the sandbox for programs that a model wrote; without it they do not run
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" /wheel/*.whl
ENV NANOCHAT_BASE_DIR=/runs
VOLUME /runs
EXPOSE 8000
ENTRYPOINT ["nanochat"]
CMD ["--help"]
