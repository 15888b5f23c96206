# Everything happens inside this folder: ComfyUI, its packages and all caches go to .bed/, results to demo/.
# PYTHON may name another Python 3.10 to 3.13; COMFYUI_PATH a ComfyUI of yours, which is used and left as it is.
PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint

help:
	@echo "make demo   run the example workflows in a private ComfyUI; results in demo/"
	@echo "make test   run all tests (ARGS='-k refiner' picks some)"
	@echo "make lint   check the code's style"

demo:
	@$(PYTHON) scripts/demo.py $(ARGS)

test:
	@$(PYTHON) scripts/run_tests.py $(ARGS)

lint:
	@$(PYTHON) scripts/run_tests.py --lint-only
