# An image for an NVIDIA GPU, and for processors (torch brings several gigabytes of CUDA along):
#   docker build -t nanochat .
#   docker run -it --gpus all -v nanochat:/runs nanochat speedrun
# A small image for processors alone; the address is in nbs/guide/howto_install.md:
#   docker build -t nanochat --build-arg PIP_EXTRA_INDEX_URL=ADDRESS .
#   docker run -it -v nanochat:/runs nanochat speedrun
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
# pip reads it, if it is given
ARG PIP_EXTRA_INDEX_URL
# the sandbox for programs that a model wrote; without it they do not run
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir /wheel/*.whl
ENV NANOCHAT_BASE_DIR=/runs
VOLUME /runs
EXPOSE 8000
ENTRYPOINT ["nanochat"]
CMD ["--help"]
