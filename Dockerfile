# One image for the embedded service: API, worker and command. PyTorch's own build is an argument, so that a CUDA
# build can be put in place of the CPU one.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/rankpress
COPY constraints.txt ./
ARG TORCH_REQUIREMENT="torch==2.13.0"
ARG TORCH_INDEX_ARGUMENTS=""
RUN /opt/rankpress/bin/pip install --no-cache-dir ${TORCH_INDEX_ARGUMENTS} "${TORCH_REQUIREMENT}"
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
COPY worker ./worker
COPY migrations ./migrations
RUN /opt/rankpress/bin/pip install --no-cache-dir --constraint constraints.txt ".[all]"

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 rankpress && install -d -o rankpress /data
COPY --from=build /opt/rankpress /opt/rankpress
ENV PATH=/opt/rankpress/bin:$PATH PYTHONUNBUFFERED=1 RANKPRESS_HOST=0.0.0.0 RANKPRESS_PORT=8080
USER rankpress
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v1/health/ready', timeout=4)"]
CMD ["rankpress", "serve", "--data", "/data"]
