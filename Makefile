# make demo    the main job on a CPU, from nothing to base against tuned
# make demo-dpo  the demo's adapter tuned on preferences, and what it gained and lost (some minutes)
# make demo-smollm2  the demo's steps on SmolLM2-135M-Instruct, from the hub or PyPI, and what it forgot (minutes)
# make results the demo's recipes, trained and evaluated, their report, and the README's figures (7 minutes)
# make test    the tests (no hub, no GPU, no network)
# make test-long   the demo from nothing, the page in a browser, real data, kills: tests that take long (10 minutes)
# make test-cluster   every ending of a job on a real Slurm, started here (Debian's slurm-wlm; 4 minutes)
# make test-vllm      a run served by a real vLLM, whose program SFTLAB_VLLM names (some minutes)
# make test-faults    trainings killed at random moments and every file of a checkpoint broken (half an hour)
# make test-fuzz      2,400 broken inputs, read by the real scripts (half an hour)
# make lint    ruff: lint and format
# make setup   the virtual environment alone
.PHONY: demo demo-dpo demo-smollm2 results test test-long test-cluster test-vllm test-faults test-fuzz lint setup clean

# Spinning OpenMP threads stall one another where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

# A worker a core, where there are two: 490 s alone; two a core took 656.
WORKERS ?= 2

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)
DEMO := runs/demo-attn_r16
DEMO_DPO := runs/demo-dpo-attn_r16
DEMO_SMOLLM2 := runs/demo-smollm2-all_r16
RECIPES := $(sort $(basename $(notdir $(wildcard recipes/demo/*.yaml))))

setup: $(STAMP)

# A machine without a GPU gets torch's CPU build: from where pip is told to look, else by uv, which knows the place.
$(STAMP): requirements.txt pyproject.toml
	@echo "installing into .venv: some minutes"
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
	  || { $(BIN)/pip install -q uv==0.13.9 && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; } \
	  || echo "torch's CPU build is not to be had: installing the default build"; fi
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python recipes/demo/build.py
	@if grep -qs '"status": "succeeded"' $(DEMO)/run.json; then echo "$(DEMO) is there already"; \
	else $(BIN)/python recipes/sft.py --config_file accelerate_configs/cpu.yaml --config recipes/demo/attn_r16.yaml; fi
	$(BIN)/python eval/quality.py --run $(DEMO)
	@echo
	@echo "Next: runs side by side       .venv/bin/python eval/report.py --runs runs"
	@echo "      chat with it            .venv/bin/python app/app.py"
	@echo "      look at the curves      .venv/bin/tensorboard --logdir runs"
	@echo "      another recipe          .venv/bin/python recipes/sft.py --config_file accelerate_configs/cpu.yaml --config recipes/demo/all_r16.yaml"
	@echo "      your own data           ... --dataset_name FILE.jsonl --output_dir runs/NAME"

demo-dpo: $(STAMP)
	$(BIN)/python recipes/demo/build.py
	@if grep -qs '"status": "succeeded"' $(DEMO)/run.json; then echo "$(DEMO) is there already"; \
	else $(BIN)/python recipes/sft.py --config_file accelerate_configs/cpu.yaml --config recipes/demo/attn_r16.yaml; fi
	@if grep -qs '"status": "succeeded"' $(DEMO_DPO)/run.json; then echo "$(DEMO_DPO) is there already"; \
	else $(BIN)/python recipes/dpo.py --config_file accelerate_configs/cpu.yaml --config recipes/demo-dpo/attn_r16.yaml; fi
	$(BIN)/python eval/preferences.py --run $(DEMO_DPO)
	@echo
	@echo "Next: beside the run that it went on from   .venv/bin/python eval/report.py --runs $(DEMO) $(DEMO_DPO) --axis method"
	@echo "      both sides of the pairs                .venv/bin/python recipes/show.py --config recipes/demo-dpo/attn_r16.yaml"
	@echo "      chat with it                           .venv/bin/python app/app.py --run $(DEMO_DPO)"
	@echo "      your own pairs                         ... --dataset_name PAIRS.jsonl --output_dir runs/NAME"

demo-smollm2: $(STAMP)
	$(BIN)/python recipes/demo-smollm2/build.py
	@if grep -qs '"status": "succeeded"' $(DEMO_SMOLLM2)/run.json; then echo "$(DEMO_SMOLLM2) is there already"; \
	else $(BIN)/python recipes/sft.py --config_file accelerate_configs/cpu.yaml --config recipes/demo-smollm2/all_r16.yaml; fi
	@echo "What was gained, on rows that it was not trained on:"
	$(BIN)/python eval/quality.py --run $(DEMO_SMOLLM2) --samples 64 --max_new_tokens 48
	@echo "What was forgotten, on pages of Python's language reference:"
	$(BIN)/python eval/quality.py --run $(DEMO_SMOLLM2) --dataset_name data/smollm2/known.jsonl
	@echo
	@echo "Next: chat with it     .venv/bin/python app/app.py --run $(DEMO_SMOLLM2)"
	@echo "      use it elsewhere .venv/bin/python recipes/export.py --run $(DEMO_SMOLLM2) --to merged --out exports/smollm2"

results: $(STAMP)
	$(BIN)/python recipes/demo/build.py
	@set -e; for recipe in $(RECIPES); do \
	  grep -qs '"status": "succeeded"' runs/demo-$$recipe/run.json \
	  || $(BIN)/python recipes/sft.py --config_file accelerate_configs/cpu.yaml --config recipes/demo/$$recipe.yaml; \
	  $(BIN)/python eval/quality.py --run runs/demo-$$recipe; done
	$(BIN)/python eval/report.py --runs $(RECIPES:%=runs/demo-%) --axis lora_target_modules lora_r --out results/demo
	$(BIN)/python benchmarks/fill_readme.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cluster: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m cluster

test-vllm: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m vllm

test-faults: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/faults/campaign.py

test-fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/campaign.py --out results/fuzz

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs data
