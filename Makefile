# Every command of the project; `make help` lists them. Each sets up what it needs: a virtual environment in .venv with
# the locked versions. Settings beyond the ones named below: ARGS='--optim.lr 1e-4' (an unknown one names the nearest).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TRITON ?= triton==3.7.1
INDEX  := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# A prompt travels by the environment, unexpanded, so that quotes and $ survive.
override PROMPT := $(value PROMPT)
export PROMPT

SIZE     ?= demo
DURATION ?= 10
SEED     ?= 0
HOURS    ?= 12
DEMO     ?= runs/demo
MUSIC    ?= data/music
export WANDB_SILENT ?= true
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup dev demo test test-slow ingest plan train runs generate import merge export codec codec-eval check check-music check-style check-melody check-finetune ablate bench bench-generate bench-codec bench-loader bench-train bench-gpu assets music lock clean

help: ## this list
	@echo "usage: make TARGET [NAME=value …] [ARGS='--setting value …']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/.core: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11, 3.12 or 3.13 is needed; {sys.executable} is {v[0]}.{v[1]}. Give another: make setup PYTHON=python3.12")'
	@# To standard error: what is made may go to standard output (make generate STREAM=1 OUT=-).
	@echo "installing the locked versions in $(VENV)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -q --progress-bar on $(INDEX) -r requirements.lock >&2
	@$(PIP) install -q --no-deps -e . >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.core requirements-dev.lock
	$(PIP) install -q --progress-bar on $(INDEX) -r requirements.lock -r requirements-dev.lock
	@# Outside the locks: a CUDA build of torch brings the Triton that it pins, a CPU build none; tests interpret its kernels.
	@$(BIN)/python -c 'import triton' 2>/dev/null || test "$$(uname -sm)" != "Linux x86_64" || $(PIP) install -q --progress-bar on "$(TRITON)"
	@touch $@

setup: $(VENV)/.core ## virtual environment with the locked versions (TORCH_INDEX=… for another torch build)
dev: $(VENV)/.dev ## the same plus the tools of test and check

demo: setup ## ingest, train, generate, report on the embedded catalogue; ends with the page to open
	$(BIN)/python -m training.demo --folder "$(DEMO)" $(ARGS)

test: dev ## the test suite, two files at a time (under 12 minutes on two cores; ARGS='-n 0' for one after the other)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: dev ## the kill, soak and browser checks that the default suite leaves out
	$(BIN)/python -m pytest -q -m slow $(ARGS)

ingest: setup ## CATALOG=… OUT=…: licensed catalogue to shards (safe to run again)
	$(BIN)/python -m pipelines.ingest --catalog "$(or $(CATALOG),musicgen/assets/catalogue/catalog.jsonl)" --out "$(or $(OUT),data/demo)" $(ARGS)

plan: setup ## SIZE=3.3b GPUS=64 GPU=h100-80 [DATA=… INIT=… LORA=16]: memory, strategy, time of a training, before anything is bought
	$(BIN)/python -m training.forecast --size "$(SIZE)" $(if $(DATA),--data "$(DATA)") $(if $(GPUS),--gpus "$(GPUS)") $(if $(GPU),--gpu "$(GPU)") $(if $(INIT),--init "$(INIT)") $(if $(LORA),--lora.rank "$(LORA)") $(ARGS)

train: setup ## SIZE=demo|300m|1.5b|3.3b DATA=… RUN=… [GPUS=8 INIT=model LORA=16 RAY=auto]: train, fine-tune, or resume the same RUN
	@case "$(GPUS)" in 0*|*[!0-9]*) echo "error: GPUS=$(GPUS): give a whole number of at least 1, the GPUs (or processes) of each machine" >&2; exit 2;; esac
	$(BIN)/python -m training.train --size "$(SIZE)" --data "$(or $(DATA),data/demo)" --run "$(or $(RUN),runs/train-$(SIZE))" $(if $(GPUS),--hardware.devices "$(GPUS)") $(if $(INIT),--init "$(INIT)") $(if $(LORA),--lora.rank "$(LORA)") $(if $(RAY),--ray.address "$(RAY)") $(ARGS)

runs: setup ## [RUN=… TRACK=…]: which trainings there are, how they stand, what they came from; which learned from a track
	$(BIN)/python -m training.runs $(if $(RUN),--run "$(RUN)") $(if $(TRACK),--track "$(TRACK)") $(ARGS)

generate: setup ## PROMPT="…" DURATION=10 [MODEL=… BASE=… OUT=… SEED=… MELODY=… STYLE=… AUDIO=… STREAM=1]: text to wav
	@$(BIN)/python -m musicgen.generate --model "$(or $(MODEL),demo)" --duration "$(DURATION)" --seed "$(SEED)" --out "$(or $(OUT),out.wav)" $(if $(MELODY),--melody "$(MELODY)") $(if $(STYLE),--style "$(STYLE)") $(if $(AUDIO),--prompt_audio "$(AUDIO)") $(if $(STREAM),--stream true) $(if $(BASE),--base "$(BASE)") $(ARGS)

import: setup ## FROM=… OUT=…: a transformers folder, audiocraft's files or a hub name as a release of ours
	$(BIN)/python -m musicgen.interop.command import --source "$(FROM)" --out "$(OUT)" $(ARGS)

merge: setup ## MODEL=… OUT=… [BASE=…]: an adapter (LORA=) and the model it was made for as one release
	$(BIN)/python -m musicgen.interop.command merge --model "$(MODEL)" --out "$(OUT)" $(if $(BASE),--base "$(BASE)") $(ARGS)

export: setup ## MODEL=… TO=transformers|audiocraft OUT=…: a release for other programs
	$(BIN)/python -m musicgen.interop.command export --model "$(or $(MODEL),demo)" --to "$(or $(TO),transformers)" --out "$(OUT)" $(if $(BASE),--base "$(BASE)") $(ARGS)

codec: setup ## [SIZE=demo|32khz DATA=… RUN=… INIT=…]: train an EnCodec from a catalogue or audio shards
	$(BIN)/python -m training.codec.train --size "$(SIZE)" --data "$(or $(DATA),$(wildcard $(MUSIC)/catalog.jsonl),musicgen/assets/catalogue/catalog.jsonl)" --run "$(or $(RUN),runs/codec-$(SIZE))" $(if $(INIT),--init "$(INIT)") $(ARGS)

codec-eval: setup ## [CODEC=demo DATA=… OUT=runs/codec-eval]: distances, pitch and bits beside Opus; a page to hear them
	$(BIN)/python -m training.codec.evaluate --codec "$(or $(CODEC),demo)" --data "$(or $(DATA),musicgen/assets/catalogue/catalog.jsonl)" --out "$(or $(OUT),runs/codec-eval)/figures.json" --page "$(or $(OUT),runs/codec-eval)/index.html" $(ARGS)

check: dev ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-finetune: setup ## [DATA=… MODEL=demo]: fine-tune on ten minutes (which ship), whole and by an adapter: does it help, and not collapse?
	$(BIN)/python -m training.finetune_check --model "$(or $(MODEL),demo)" --size "$(SIZE)" --data "$(or $(DATA),musicgen/assets/held_out)" --out "$(or $(OUT),runs/check-finetune)" $(ARGS)

ablate: setup ## [DATA=… STEPS=400 OUT=runs/ablate]: the paper's codebook patterns for equal updates and equal compute
	$(BIN)/python -m training.ablate --size "$(SIZE)" --data "$(or $(DATA),data/demo)" --out "$(or $(OUT),runs/ablate)" $(if $(STEPS),--steps "$(STEPS)") $(ARGS)

check-music: setup ## [MODEL=… DATA=…]: does the model make music, and the music asked for?
	$(BIN)/python -m training.music_check --model "$(or $(MODEL),demo)" --data "$(or $(DATA),$(DEMO)/data)" $(ARGS)

check-style: setup ## DATA=… RUN=…: what a style by example brings to the demo model (trains it first)
	$(BIN)/python -m training.style_check --data "$(or $(DATA),data/demo)" --run "$(or $(RUN),runs/style)" $(ARGS)

check-melody: setup ## DATA=… RUN=…: does augmentation help a melody model? (DATA with --chroma_variants; trains two or three)
	$(BIN)/python -m training.melody_check --data "$(or $(DATA),data/melody)" --runs "$(or $(RUN),runs/melody)" $(ARGS)

bench: setup ## speed of ingest by stage and of training, as tables (keep the machine otherwise idle)
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.training

bench-codec: setup ## [CODEC=demo]: encoding beside eager transformers; codes of windows, crops and batches compared
	$(BIN)/python -m benchmarks.codec $(if $(CODEC),--codecs "[$(CODEC)]") $(ARGS)

bench-generate: setup ## [SIZE=300m]: speed of generation beside transformers', and what int8 weights cost
	$(BIN)/python -m benchmarks.generate --size "$(if $(filter command,$(origin SIZE)),$(SIZE),300m)" $(ARGS)

bench-loader: setup ## clips per second of the training loader on two cores, tokenising included
	$(BIN)/python -m benchmarks.loader $(ARGS)

bench-train: setup ## [SIZE=300m]: a training step beside that of a plain transformers MusicGen, and where its time goes
	$(BIN)/python -m benchmarks.training --size "$(if $(filter command,$(origin SIZE)),$(SIZE),300m)" --steps 10 $(ARGS)

bench-gpu: setup ## what only a GPU can show, by section, as one JSON (OUT=gpu.json)
	$(BIN)/python -m benchmarks.gpu --out "$(or $(OUT),gpu.json)" $(ARGS)

music: setup ## HOURS=12 MUSIC=…: render more music of the demo's kind, losslessly (needs fluidsynth and FluidR3_GM)
	$(BIN)/python -m pipelines.demo.catalogue --hours "$(HOURS)" --out "$(MUSIC)" $(ARGS)

assets: setup ## rebuild everything shipped: audio, codec, tokens, demo model, golden figures (hours; resumable)
	$(BIN)/python -m training.assets $(ARGS)

lock: dev ## resolve the locks anew from pyproject.toml
	$(PIP) install -q uv
	$(BIN)/python infra/lock.py

clean: ## remove what the commands made here (not the virtual environment, not the shipped assets)
	rm -rf runs data out out.wav build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
