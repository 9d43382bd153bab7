# Shorthands; the commands themselves are in README.md and CONTRIBUTING.md.
.PHONY: setup test fast lint bench static

setup:
	pip install -e '.[dev]'

test:
	pytest -q -n 2

fast:  # under two minutes on two cores
	pytest -q -n 2 -m 'not slow'

lint:
	ruff check . && ruff format --check . && mypy

bench:
	pytest bench --benchmark-autosave

static:
	python -m bench.static_report --check
