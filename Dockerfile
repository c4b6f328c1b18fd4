# docker build -t nybble .
# docker run -p 8000:8000 -v models:/models nybble --model demo
# docker run --gpus all -p 8000:8000 -v models:/models nybble --model org/name

FROM python:3.12-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/nybble
ENV PATH=/opt/nybble/bin:$PATH
# Empty for the build with CUDA, which runs on CPUs too; PyTorch's index of CPU builds for an image
# several gigabytes smaller.
ARG TORCH_INDEX_URL=
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt \
    ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY engine engine
COPY finetune finetune
COPY kernels kernels
COPY loaders loaders
COPY models models
COPY quantizers quantizers
COPY server server
COPY src src
# More of them: s3, gcs.
ARG EXTRAS=otel,redis
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM python:3.12-slim-bookworm
# The CPU kernels, and Triton's launchers on a GPU, are compiled for the machine they run on, at the
# first start; tini passes signals on.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nybble \
    && install -d -o nybble -g nybble /models
COPY --from=build /opt/nybble /opt/nybble
# Downloads, packed models and compiled kernels: mount a volume here to keep them.
ENV PATH=/opt/nybble/bin:$PATH HF_HOME=/models/hub XDG_CACHE_HOME=/models/cache \
    TRITON_CACHE_DIR=/models/cache/triton PYTHONUNBUFFERED=1
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["tini", "--", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "demo"]
