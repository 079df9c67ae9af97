.PHONY: demo test long fast lint setup clean

demo: setup ## set everything up and run the main job: base model to forgetting report
	.venv/bin/harness demo

test: setup ## all tests, slow ones too
	.venv/bin/python -m pytest -n 2 --dist worksteal

long: setup ## the tests that pre-train small models, minutes each
	.venv/bin/python -m pytest -n 2 --dist worksteal -m long

fast: setup ## the tests that take seconds
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not long"

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

setup: ## make .venv, or return at once if it is up to date
	@scripts/setup

clean: ## remove .venv and caches; runs/ and benchmarks/results/ stay
	rm -rf .venv dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
