# The image every step runs in, for CUDA as it stands, for CPU by an argument:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# With a compiler and torch's headers, for recipes that say `compile`:
#   docker build --target compile .
# The client, for the commands that only speak to servers, without torch:
#   docker build --target client .
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
    && find /opt/danceopd/lib -type d \( -name tests -o -path '*/torch/test' \) -prune -exec rm -r {} + \
    && mv /opt/danceopd/lib/python3.11/site-packages/torch/include /opt/torch-include

COPY LICENSE README.md ./
COPY danceopd danceopd
COPY components components
COPY pipelines pipelines
# setuptools is in the environment already, in its locked version: torch asks for it.
RUN /opt/danceopd/bin/pip install --no-deps --no-build-isolation . \
    && /opt/danceopd/bin/pip check \
    && /opt/danceopd/bin/danceopd --version

# What is in the image, for whoever must answer for it: a CycloneDX bill of materials, made by a tool that stays outside.
RUN python3 -m venv /opt/sbom && /opt/sbom/bin/pip install cyclonedx-bom==7.5.0 \
    && /opt/sbom/bin/cyclonedx-py environment /opt/danceopd --output-file /opt/danceopd/sbom.cdx.json


FROM ${BASE_IMAGE} AS client-build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/danceopd \
    && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['client'], sep='\n')" > requirements.txt \
    && /opt/danceopd/bin/pip install -c constraints.txt -r requirements.txt setuptools \
    && find /opt/danceopd/lib -type d -name tests -prune -exec rm -r {} +
COPY LICENSE README.md ./
COPY danceopd danceopd
COPY components components
COPY pipelines pipelines
# No `pip check`: what the package needs to train is left out on purpose.
RUN /opt/danceopd/bin/pip install --no-deps --no-build-isolation . \
    && /opt/danceopd/bin/danceopd pipeline --help && /opt/danceopd/bin/danceopd job --help

# What is in the image, for whoever must answer for it: a CycloneDX bill of materials, made by a tool that stays outside.
RUN python3 -m venv /opt/sbom && /opt/sbom/bin/pip install cyclonedx-bom==7.5.0 \
    && /opt/sbom/bin/cyclonedx-py environment /opt/danceopd --output-file /opt/danceopd/sbom.cdx.json


# User, folders and variables of both images.
FROM ${BASE_IMAGE} AS runtime

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
# Whatever is written goes to /tmp or /workspace: the root may be mounted read-only. USER and LOGNAME serve libraries
# that ask for a name where the user id has none; git is not in the image, and MLflow need not warn of it.
ENV PATH=/opt/danceopd/bin:${PATH} \
    HOME=/tmp \
    TMPDIR=/tmp \
    USER=danceopd \
    LOGNAME=danceopd \
    HF_HOME=/workspace/.cache/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    DVC_SITE_CACHE_DIR=/tmp/dvc \
    GIT_PYTHON_REFRESH=quiet \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
# For Docker and its like; Kubernetes has probes of its own, and a job's pod needs none.
HEALTHCHECK --interval=5m --timeout=60s CMD ["danceopd", "--version"]
ENTRYPOINT ["danceopd"]
CMD ["--help"]


FROM runtime AS client

COPY --from=client-build /opt/danceopd /opt/danceopd
USER 1000:0


# For recipes that say `compile`: triton and inductor call a C and a C++ compiler, and read torch's headers.
FROM runtime AS compiler

RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*


FROM compiler AS compile

COPY --from=build /opt/danceopd /opt/danceopd
COPY --from=build /opt/torch-include /opt/danceopd/lib/python3.11/site-packages/torch/include
USER 1000:0


# The last stage is what is built unless another is named.
FROM runtime AS full

COPY --from=build /opt/danceopd /opt/danceopd
USER 1000:0
