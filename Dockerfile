# Three images: `api` (no PyTorch), `worker`, and `embedded`, which is both in one process and the one built by default.
#   docker build --target api .
#   docker build --target worker --build-arg TORCH_INDEX_ARGUMENTS="--index-url …" .
# Which build of PyTorch a worker has, for the CPU or for a version of CUDA, is said by the index that it comes from.

FROM python:3.11-slim AS base
RUN useradd --create-home --uid 10001 rankpress && install -d -o rankpress -g rankpress /data /blobs
ENV PATH=/opt/rankpress/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RANKPRESS_DATA_DIR=/data
STOPSIGNAL SIGTERM

FROM base AS build
WORKDIR /src
RUN python -m venv /opt/rankpress
COPY constraints.txt pyproject.toml README.md LICENSE ./

FROM build AS build-with-torch
ARG TORCH_REQUIREMENT="torch==2.13.0"
ARG TORCH_INDEX_ARGUMENTS=""
RUN pip install --no-cache-dir ${TORCH_INDEX_ARGUMENTS} "${TORCH_REQUIREMENT}"

FROM build AS build-api
COPY service ./service
COPY worker ./worker
COPY migrations ./migrations
RUN pip install --no-cache-dir --constraint constraints.txt ".[api]"

FROM build-with-torch AS build-worker
COPY service ./service
COPY worker ./worker
COPY migrations ./migrations
RUN pip install --no-cache-dir --constraint constraints.txt ".[worker]"

FROM build-with-torch AS build-embedded
COPY service ./service
COPY worker ./worker
COPY migrations ./migrations
RUN pip install --no-cache-dir --constraint constraints.txt ".[all]"

FROM base AS api
COPY --from=build-api /opt/rankpress /opt/rankpress
USER rankpress
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=8s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v1/health/ready', timeout=6)"]
CMD ["rankpress", "serve", "--data", "/data", "--host", "0.0.0.0", "--port", "8080"]

FROM base AS worker
COPY --from=build-worker /opt/rankpress /opt/rankpress
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER rankpress
VOLUME /data
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s \
    CMD ["rankpress", "doctor", "--worker"]
CMD ["rankpress", "worker", "--data", "/data"]

FROM base AS embedded
COPY --from=build-embedded /opt/rankpress /opt/rankpress
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER rankpress
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=8s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v1/health/ready', timeout=6)"]
CMD ["rankpress", "serve", "--data", "/data", "--host", "0.0.0.0", "--port", "8080"]
