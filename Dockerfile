# The image every step runs in, for CUDA as it stands, for CPU by an argument:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# Another base (BASE_IMAGE) must bring Python 3.11 with its venv module.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build

# One more package index, for another build of torch than the default's (CPU only, or another CUDA).
ARG TORCH_INDEX=""

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# Dependencies first: a change of the code leaves this layer, most of the image, as it is.
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/danceopd \
    && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && /opt/danceopd/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt -r requirements.txt \
    && find /opt/danceopd/lib -type d \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' \) -prune \
        -exec rm -r {} +

COPY LICENSE README.md ./
COPY danceopd danceopd
COPY components components
COPY pipelines pipelines
# setuptools is in the environment already, in its locked version: torch asks for it.
RUN /opt/danceopd/bin/pip install --no-deps --no-build-isolation . \
    && /opt/danceopd/bin/pip check \
    && /opt/danceopd/bin/danceopd --version


FROM ${BASE_IMAGE}

ARG BASE_IMAGE
ARG REVISION=""
LABEL org.opencontainers.image.title="danceopd" \
      org.opencontainers.image.description="On-policy distillation of several image models into one student" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.revision="${REVISION}"

# Group 0 may write the workspace, so that a platform that picks the user id itself works too.
RUN useradd --uid 1000 --gid 0 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin danceopd \
    && install --directory --owner 1000 --group 0 --mode 0775 /workspace
COPY --from=build /opt/danceopd /opt/danceopd

# Whatever is written goes to /tmp or /workspace: the root may be mounted read-only. USER and LOGNAME serve libraries
# that ask for a name where the user id has none; git is not in the image, and MLflow need not warn of it.
ENV PATH=/opt/danceopd/bin:${PATH} \
    HOME=/tmp \
    TMPDIR=/tmp \
    USER=danceopd \
    LOGNAME=danceopd \
    HF_HOME=/workspace/.cache/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    DVC_SITE_CACHE_DIR=/tmp/dvc \
    GIT_PYTHON_REFRESH=quiet \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 1000:0
# For Docker and its like; Kubernetes has probes of its own, and a job's pod needs none.
HEALTHCHECK --interval=5m --timeout=60s CMD ["danceopd", "--version"]
ENTRYPOINT ["danceopd"]
CMD ["--help"]
