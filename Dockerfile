# Two images from one file:  docker build --target serve .   and   docker build --target train .
# A smaller build for machines without a GPU: point pip at an index of CPU wheels of torch,
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... --target serve .

FROM python:3.11-slim AS base
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 1000 dino
WORKDIR /srv
COPY requirements.lock ./
# torch alone first: it is most of the image and changes least, so both targets and every later build share its layer.
RUN pip install --constraint requirements.lock torch torchvision


FROM base AS serve
COPY pyproject.toml README.md LICENSE ./
COPY dino_core dino_core
COPY training training
COPY app app
RUN pip install --constraint requirements.lock '.[serve,milvus]' \
    && mkdir /data && chown dino:dino /data
COPY models /models
USER dino
WORKDIR /home/dino
# Inside the container every interface is the container's own; compose publishes the port on the host's loopback only.
ENV DINO_SERVE_MODEL=/models/default DINO_SERVE_DATA_DIR=/data DINO_SERVE_HOST=0.0.0.0 DINO_SERVE_INSECURE=true
# Converted models outlive the container, whose other files can't be written.
ENV XDG_CACHE_HOME=/data/cache
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["dino-serve"]
CMD ["run"]


FROM base AS train
COPY pyproject.toml README.md LICENSE ./
COPY dino_core dino_core
COPY training training
COPY app app
RUN pip install --constraint requirements.lock '.[train]' \
    && mkdir /runs /models && chown dino:dino /runs /models
USER dino
WORKDIR /home/dino
VOLUME /runs /models
ENTRYPOINT ["dino-train"]
CMD ["run", "--help"]
