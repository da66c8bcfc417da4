# Every target works from a bare clone: it makes its own virtual environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-hub test test-slow lint format bench bench-speed bench-claims bench-cards bench-convert clean

demo: $(VENV)/demo  ## a real BERT becomes a mixture of experts
	$(BIN)/python examples/minilm.py

demo-hub: $(VENV)/demo  ## it goes to a Hub on this machine, and comes back
	PYTHONPATH=. $(BIN)/python examples/hub.py

test: $(VENV)/dev  ## the whole test suite but the slow proofs
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow and not gpu"

test-slow: $(VENV)/dev  ## the slow proofs
	$(BIN)/python -m pytest -m slow

# Type checker and import-linter do not follow the package-dir map, so they look at a plain installed copy.
lint: $(VENV)/dev  ## style, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint build/lib build/bdist* && $(INSTALL) --no-deps --no-build-isolation --target build/lint .
	cd build/lint && $(abspath $(BIN))/python -m mypy --config-file ../../pyproject.toml -p hf_moe
	cd build/lint && PYTHONPATH=. $(abspath $(BIN))/lint-imports --config ../../pyproject.toml --no-cache

format: $(VENV)/dev  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev  ## the figures in benchmarks/
	$(BIN)/python benchmarks/conversion.py
	$(BIN)/python benchmarks/router_start.py
	$(BIN)/python benchmarks/detached_normalizer.py
	$(BIN)/python benchmarks/reductions.py
	$(BIN)/python benchmarks/fused_gates.py
	$(BIN)/python benchmarks/routing_report.py
	PYTHONPATH=. $(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/experts_export.py

bench-speed: $(VENV)/dev  ## experts and whole models against dense layers and Transformers' own (wants a quiet machine)
	$(BIN)/python benchmarks/experts_speed.py
	$(BIN)/python benchmarks/end_to_end.py

bench-claims: $(VENV)/dev  ## what mixtures gain on their dense models (hours; may be stopped, and goes on)
	$(BIN)/python benchmarks/claims.py

bench-cards: $(VENV)/dev  ## the cards of what recipes made, in model_cards/
	$(BIN)/python benchmarks/model_cards.py

bench-convert: $(VENV)/dev  ## conversion against the disk and mergekit-moe (needs 40 GB of disk)
	$(BIN)/python benchmarks/convert_speed.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	touch $@
