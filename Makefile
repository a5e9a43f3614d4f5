# `make run` and `make test` each make .venv from constraints.txt first; a second call finds it ready.
#
#   make run                      the whole chain on the small world
#   make test                     everything a change must pass
#   make unit                     the inner loop: what takes no more than about half a second a test, in one process
#   make bench                    the CPU benchmarks, as a Markdown block for benchmarks/RESULTS.md
#   make docs                     the pages and the API as a site in site/, every link checked
#   make image                    the container image; TARGET=compile: with a compiler, for recipes that say `compile`
#   make client-image             the one for commands that only speak to servers, without torch
#   make image-jobs               the Jobs of manifests/overlays/local in it, as their pods say; ENGINE=docker
#
#   PYTHON=python3.12             the interpreter .venv is made from
#   TORCH_INDEX=URL               one more package index, for another build of torch than the default's;
#                                 https://download.pytorch.org/whl/cpu saves 4 GB where there is no GPU.
#                                 (pip's own PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS and so on work as ever.)

PYTHON      ?= $(shell for p in python3.11 python3; do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
TORCH_INDEX ?=
IMAGE       ?= danceopd:dev
CLIENT      ?= danceopd-client:dev
TARGET      ?= full
BASE_IMAGE  ?=
BUILDER     ?= docker
ENGINE      ?= podman

BIN   := .venv/bin
READY := .venv/.ready

# An environment that happens to be active must not leak into this one. And bytecode must be kept: pip is told not to
# compile 22,000 files of which a run imports 6,000, so the first run does, and only the first.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

.PHONY: run test unit bench docs image client-image image-jobs
.DELETE_ON_ERROR:

run: $(READY)
	$(BIN)/danceopd pipeline run --recipe world

# One thread a worker: two workers with all cores each only get in each other's way.
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

bench: $(READY)
	$(BIN)/python -m benchmarks

# In an environment of its own: the site is built from the sources as text.
docs:
	"$(PYTHON)" -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$$(.venv-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	.venv-docs/bin/mkdocs build --strict --quiet

image:
	$(BUILDER) build --tag $(IMAGE) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
		$(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) --target $(TARGET) \
		--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) .

client-image:
	$(BUILDER) build --target client --tag $(CLIENT) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
		--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) .

image-jobs: $(READY)
	$(BIN)/python manifests/run_jobs.py --overlay local --workspace runs/image-jobs --image $(IMAGE) --engine "$(ENGINE)"

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "make: needs Python 3.11 or newer; name one by PYTHON=..." >&2; exit 2; }
	@echo "make: .venv from constraints.txt, a minute or two"
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable ".[dev]"
	@touch $@
