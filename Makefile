# The whole method as a dependency graph: a stage runs again only when what it reads has changed.
#
#   make demo                    the tiny world, end to end: out/report/report.md
#   make demo SEED=1 OUT=out/1   another world, users, models
#   make watch                   beside a demo: out/watch.png, the curves of what is trained
#   make claims                  every claim of the paper's results: out/claims/report.md
#   make test                    the test suite (TESTS="..." adds arguments for pytest)
#   make real DATA=FOLDER        the same scripts on human data: out/real/report/report.md
#   make public DATA=FOLDER      those models on public evaluation sets: out/real/public/report.md
#   make gpt2 SIZE=gpt2          real data and GPT-2, 124M to 1.5B, on one GPU: out/gpt2/report/report.md
#   make lint | clean
#
# Each job makes its own environment (.venv) first. Stages of a demo can be made by name, for
# example `make out/rm/model.safetensors`.

SHELL   := bash
PYTHON  ?= python3
OUT     ?= out
SEED    ?= 0
DATA    ?=
TESTS   ?=
CLAIMS  ?=
ifneq ($(filter ~/%,$(OUT) $(DATA)),)
override OUT  := $(patsubst ~/%,$(HOME)/%,$(OUT))
override DATA := $(patsubst ~/%,$(HOME)/%,$(DATA))
endif
# Make and the shell take white space and these characters for more than a part of a name.
odd     := : % $$ \# ; ' " ` \ * ? [ ] { } ( ) & | < > ! ~ =
is_odd   = $(filter-out 1,$(words x$(1)x))$(filter -%,$(1))$(strip $(foreach c,$(odd),$(findstring $(c),$(1))))
refuse   = $(error $(1)="$(value $(1))" is empty or has white space, a leading - or one of $(odd); expected $(2))
plain    = $(if $(call is_odd,$(value $(1))),$(call refuse,$(1),$(2)))
$(call plain,OUT,the name of a folder)$(if $(OUT),,$(call refuse,OUT,the name of a folder))
$(call plain,DATA,the name of a folder)$(call plain,COMPARISONS,the name of a file)
$(call plain,SEED,a whole number)
$(if $(shell [[ "$(SEED)" =~ ^(0|[1-9][0-9]*)$$ ]] && echo yes),,$(error SEED="$(SEED)": expected a whole number, such as 1))
py      := .venv/bin/python
# Two stages at a time where the graph allows it, each on half of the cores: small matrix products
# use two separate cores better than two together. A stage that has to run alone gets all that are
# free: two threads, one of them on a core that is taken, are far slower than one. In case a core is
# taken later, threads that wait for each other give up their core sooner than by default.
MAKEFLAGS += --jobs=2
ifneq ($(MAKECMDGOALS),clean)
half    := OMP_NUM_THREADS=$(or $(shell $(PYTHON) data/stages.py half 2>/dev/null),$(error \
  PYTHON=$(PYTHON) does not run data/stages.py; expected a Python 3, as in PYTHON=/usr/bin/python3))
endif
alone   := OMP_NUM_THREADS="$$($(py) data/stages.py free)"
export GOMP_SPINCOUNT ?= 30000
# The line that a stage of the demo begins with. Lines of two stages must not mix: bars become lines
# where they can, and each line is written whole.
started := $(shell echo $$(date +%s).$$PPID)
stage    = @$(py) data/stages.py start $(started) $(OUT) $@ $(MAKECMDGOALS)
# A training run that was stopped goes on, unless what it is made from has changed since.
resume   = $(shell $(PYTHON) data/stages.py resume $@ $^ run.py Makefile)
# FOLDER/settings has the VARIABLES that a folder's first stage was made with; of an older demo its
# world has the seed. $(call begun,FOLDER,VARIABLES) refuses other values, before anything runs.
record   = @printf '%s\n' $(foreach v,$(2),$(v)=$($(v))) > $(1)/settings
settings = $(shell cat $(1)/settings 2>/dev/null || sed -n 's/^ "seed": \([0-9]*\),/SEED=\1/p' $(1)/data/world.json 2>/dev/null)
begun    = $(foreach v,$(2),$(if $($(v)),$(foreach old,$(filter-out $(v)=$($(v)),$(filter $(v)=%,$(settings))),$(error \
  $(1) was begun with $(old), not $(v)=$($(v)): give another OUT, as in "make $(goals) $(v)=$($(v)) OUT=$(OUT)/1", or \
  $(if $(filter $(OUT),$(1)),"make clean OUT=$(OUT)",delete $(1)) first))))
goals   := $(or $(MAKECMDGOALS),demo)
export TQDM_MININTERVAL := 5
unexport PYTHONUNBUFFERED
D       := $(OUT)/data
weights  = $(OUT)/$(1)/model.safetensors

.PHONY: demo watch claims test real public lint clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(OUT)/report/report.md
	@cat $(OUT)/report/table.txt
	@echo "The report is $(OUT)/report/report.md, its figures beside it."

watch: .venv/ready
	nice $(py) -m evaluation.watch --out $(OUT)

# About two hours of two idle cores by its plan (CLAIMS="--plan"); started again, it goes on.
claims: .venv/ready
	$(py) -m tests.claims --out $(OUT)/claims $(CLAIMS)

test: .venv/ready
	OMP_NUM_THREADS=1 $(py) -m pytest -n auto --dist loadfile $(TESTS)

lint: .venv/ready
	$(py) -m ruff check .
	$(py) -m ruff format --check .

ifneq ($(filter clean,$(MAKECMDGOALS)),)
ifneq ($(words $(MAKECMDGOALS)),1)
$(error clean deletes what the other targets make; give it alone)
endif
ifneq ($(shell git ls-files -- "$(OUT)" 2>/dev/null),)
$(error OUT=$(OUT) holds files of the repository; clean would delete them)
endif
endif
clean:
	rm -rf -- "$(OUT)"

.venv/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(py) -m pip install -q -r requirements.txt -r tests/requirements.txt
	@touch $@

# ------------------------------------------------------------------------------------------------
# The tiny world

$(if $(filter-out test lint clean watch claims .venv/ready real public gpt2 $(OUT)/real/% $(OUT)/gpt2%,$(goals)),$(call begun,$(OUT),SEED))

# Facts, users, prompts, demonstrations, pretraining text, tokenizer.
world := $(filter-out %/grader.py %/labelers.py %/marks.py,$(wildcard data/tiny/*.py)) data/hygiene.py data/tokenizer.py data/files.py
$(D)/card.md: $(world) | .venv/ready
	$(stage)
	$(py) -m data.tiny.make --out $(D) --seed $(SEED)
	$(call record,$(OUT),SEED)

# Step 0: the base model, by pretraining.
$(call weights,base): train_sft.py model.py $(D)/card.md
	$(stage)
	$(alone) $(py) train_sft.py $(resume) --out $(OUT)/base --seed $(SEED) --tokenizer $(D)/tokenizer.json \
	  --pretrain_data $(D)/train/pretrain.txt --val_pretrain_data $(D)/valid/pretrain.txt \
	  --epochs 1 --batch_size 8 --lr 3e-3 --warmup_steps 50 --weight_decay 0.1 --resid_pdrop 0

# Step 1: SFT, and the model that PPO starts from (C.3).
sft_data = --data $(D)/train/demonstrations.jsonl --val_data $(D)/valid/demonstrations.jsonl
$(call weights,sft): train_sft.py $(call weights,base)
	$(stage)
	$(half) $(py) train_sft.py $(resume) --init $(OUT)/base --out $(OUT)/sft --seed $(SEED) $(sft_data)

$(call weights,init): train_sft.py $(call weights,base)
	$(stage)
	$(half) $(py) train_sft.py $(resume) --init $(OUT)/base --out $(OUT)/init --seed $(SEED) $(sft_data) \
	  --pretrain_data $(D)/train/pretrain.txt --val_pretrain_data $(D)/valid/pretrain.txt \
	  --pretrain_fraction 0.1 --no-epoch_checkpoints

# Step 2: K = 4..9 responses a prompt, rankings, reward model.
# Those for training are drawn in two parts, side by side.
candidates = $(half) $(py) sample.py --num_responses 4 9 --seed $(SEED) \
               --checkpoints sft=$(OUT)/sft base=$(OUT)/base --shares 0.9 0.1
$(D)/train/candidates_%.jsonl: sample.py $(call weights,sft) $(call weights,base)
	$(stage)
	$(candidates) --data $(D)/train/rm_prompts.jsonl --out $@ --part $*/2

$(D)/train/candidates.jsonl: $(D)/train/candidates_1.jsonl $(D)/train/candidates_2.jsonl
	cat $^ > $@

$(D)/valid/candidates.jsonl: sample.py $(call weights,sft) $(call weights,base)
	$(stage)
	$(candidates) --data $(D)/valid/rm_prompts.jsonl --out $@

# Three labelers rank each training prompt, whose pairs train_rm.py joins into one batch element; one
# of its responses is another prompt's. Validation is on samples as they are, with the same noise.
label     = $(py) -m data.label --out $@ --world $(D)/world.json --seed $(SEED)
labelers := data/label.py data/tiny/labelers.py data/tiny/grader.py data/tiny/world.py
rankings := $(D)/train/comparisons.jsonl
$(rankings): $(D)/train/candidates.jsonl $(labelers)
	$(label) --data $< --pool training --labelers 3 --off_topic 1

$(D)/valid/comparisons.jsonl: $(D)/valid/candidates.jsonl $(labelers) $(rankings)
	$(label) --data $< --pool training --noise_of $(rankings)

$(D)/valid/comparisons_held_out.jsonl: $(D)/valid/candidates.jsonl $(labelers) $(rankings)
	$(label) --data $< --pool held_out --noise_of $(rankings)

$(call weights,rm): train_rm.py model.py $(D)/train/comparisons.jsonl $(D)/valid/comparisons.jsonl \
                    $(D)/valid/comparisons_held_out.jsonl
	$(stage)
	$(alone) $(py) train_rm.py $(resume) --init $(OUT)/sft --out $(OUT)/rm --seed $(SEED) \
	  --data $(D)/train/comparisons.jsonl --val_data $(D)/valid/comparisons.jsonl \
	  --held_out_data $(D)/valid/comparisons_held_out.jsonl \
	  --demonstrations $(D)/train/demonstrations.jsonl

# The SFT baseline: of the epochs that the reward model likes best on validation prompts (C.1), the
# last that is within a standard error.
$(call weights,sft_selected): evaluate.py evaluation/select.py sample.py $(call weights,rm)
	$(stage)
	$(half) $(py) evaluate.py select --run $(OUT)/sft --reward_model $(OUT)/rm --out $(OUT)/sft_selected \
	  --data $(D)/valid/rm_prompts.jsonl --num_prompts 100 --select_every 3 --seed $(SEED) --world $(D)/world.json

# Step 3: PPO and PPO-ptx, which differ in the pretraining gradients alone.
ppo = $(half) $(py) train_ppo.py $(resume) --init $(OUT)/init --reward_model $(OUT)/rm --seed $(SEED) \
        --data $(D)/train/ppo_prompts.jsonl --val_data $(D)/valid/ppo_prompts.jsonl
$(call weights,ppo): train_ppo.py model.py $(call weights,rm) $(call weights,init)
	$(stage)
	$(ppo) --out $(OUT)/ppo

$(call weights,ppo_ptx): train_ppo.py model.py $(call weights,rm) $(call weights,init)
	$(stage)
	$(ppo) --out $(OUT)/ppo_ptx --ptx_coef 1 --pretrain_data $(D)/train/pretrain.txt

# What each step did. PPO-ptx takes longest; the models before it are measured meanwhile.
measuring := evaluate.py evaluation/measure.py evaluation/report.py sample.py data/tiny/grader.py \
             data/tiny/corpus.py data/real/text_metrics.py
measure = $(half) $(py) evaluate.py measure --out $@ --seed $(SEED) --reward_model $(OUT)/rm \
            --reference $(OUT)/init --world $(D)/world.json --data $(D)/test/prompts.jsonl \
            --pretrain_data $(D)/test/pretrain.txt
measured := $(foreach model,base sft init ppo ppo_ptx,$(OUT)/report/$(model).json)
# All are judged by the reward model, and compared with the model that PPO starts from.
$(measured): $(measuring) $(call weights,rm) $(call weights,init)
$(OUT)/report/base.json: $(call weights,base)
	$(stage)
	$(measure) --name base --checkpoint $(OUT)/base --best_prefix --val_data $(D)/valid/rm_prompts.jsonl
$(OUT)/report/sft.json: $(call weights,sft_selected)
	$(stage)
	$(measure) --name sft --checkpoint $(OUT)/sft_selected --resample --best_of 4
$(OUT)/report/init.json: $(call weights,init)
	$(stage)
	$(measure) --name init --checkpoint $(OUT)/init
$(OUT)/report/ppo.json: $(call weights,ppo)
	$(stage)
	$(measure) --name ppo --checkpoint $(OUT)/ppo
$(OUT)/report/ppo_ptx.json: $(call weights,ppo_ptx)
	$(stage)
	$(measure) --name ppo_ptx --checkpoint $(OUT)/ppo_ptx

$(OUT)/report/report.md: $(call weights,ppo_ptx) evaluation/report.py evaluation/figures.py data/tiny/labelers.py $(measured)
	$(stage)
	$(py) evaluate.py report --measured $(measured) --baseline sft --out $(OUT)/report \
	  --comparisons $(rankings)

# ------------------------------------------------------------------------------------------------
# Real human data: the same scripts with GPT-2's tokenizer, on local copies of the raw data sets.
# The sizes below are for two CPU cores, 20 minutes; with a GPU start from --init gpt2.

R        := $(OUT)/real
real_lim := --max_prompt_tokens 160 --max_new_tokens 64
$(if $(filter real $(R)/%,$(filter-out $(R)/public/%,$(goals))),$(call begun,$(R),SEED DATA))
$(if $(filter public $(R)/public/%,$(goals)),$(call begun,$(R),SEED)$(call begun,$(R)/public,DATA))

real: $(R)/report/report.md $(R)/folds/folds.md
	@cat $(R)/report/table.txt $(R)/folds/folds.md
	@echo "The report is $(R)/report/report.md; reward-model accuracy in $(R)/folds/folds.md."

$(R)/data/account.txt: data/real/prepare.py data/real/convert.py data/real/raw.py \
                       data/real/sources.py data/hygiene.py data/tokenizer.py data/files.py | .venv/ready
	@test -n "$(DATA)" || { echo "error: give DATA=<folder of raw data sets>" >&2; exit 2; }
	$(py) -m data.real.prepare novels alpaca oasst qa-feedback --from $(DATA) --out $(R)/data \
	  --passage_chars 300 --seed $(SEED)
	$(call record,$(R),SEED DATA)

$(R)/base/model.safetensors: train_sft.py $(R)/data/account.txt
	$(alone) $(py) train_sft.py $(resume) --out $(R)/base --seed $(SEED) --tokenizer $(R)/data/tokenizer.json \
	  --pretrain_data $(R)/data/train/pretrain.txt --max_steps 120 --epochs 1 --batch_size 16 \
	  --n_positions 256 --short_fraction 0 --lr 4e-3 --warmup_steps 50 --weight_decay 0.1 \
	  --resid_pdrop 0

real_sft = --data $(R)/data/train/demonstrations.jsonl --val_data $(R)/data/valid/demonstrations.jsonl \
           --init $(R)/base --seed $(SEED) --epochs 1 --lr 2e-3 --no-epoch_checkpoints $(real_lim)
$(R)/sft/model.safetensors: $(R)/base/model.safetensors
	$(half) $(py) train_sft.py $(resume) $(real_sft) --out $(R)/sft
$(R)/init/model.safetensors: $(R)/base/model.safetensors
	$(half) $(py) train_sft.py $(resume) $(real_sft) --out $(R)/init \
	  --pretrain_data $(R)/data/train/pretrain.txt --pretrain_fraction 0.1

# Human K-way rankings of some 460 prompts. Six epochs instead of two only learn them by heart.
real_rm := --lr 1e-3 --epochs 2
$(R)/rm/model.safetensors: train_rm.py $(R)/sft/model.safetensors
	$(half) $(py) train_rm.py $(resume) --init $(R)/sft --out $(R)/rm --seed $(SEED) $(real_rm) $(real_lim) \
	  --data $(R)/data/train/comparisons.jsonl --val_data $(R)/data/valid/comparisons.jsonl \
	  --demonstrations $(R)/data/train/demonstrations.jsonl

real_ppo = --init $(R)/init --reward_model $(R)/rm --seed $(SEED) --data $(R)/data/train/prompts.jsonl \
           --batch_size 32 --num_minibatches 8 --responses_per_prompt 1 --max_steps 30 \
           --kl_coef 0.05 --lr 6e-4 --value_lr 5e-4 --warmup_steps 10 --ema 0.992 $(real_lim)
$(R)/ppo_ptx/model.safetensors: train_ppo.py $(R)/rm/model.safetensors $(R)/init/model.safetensors
	$(half) $(py) train_ppo.py $(resume) $(real_ppo) --out $(R)/ppo_ptx --ptx_coef 1 --ptx_ratio 0.5 \
	  --pretrain_data $(R)/data/train/pretrain.txt
$(R)/ppo/model.safetensors: train_ppo.py $(R)/rm/model.safetensors $(R)/init/model.safetensors
	$(half) $(py) train_ppo.py $(resume) $(real_ppo) --out $(R)/ppo --ptx_coef 0

real_measure = $(half) $(py) evaluate.py measure --out $@ --seed $(SEED) --reward_model $(R)/rm \
                 --reference $(R)/init --data $(R)/data/test/prompts_200.jsonl --num_prompts 64 \
                 --pretrain_data $(R)/data/test/pretrain.txt --num_pretrain_tokens 50000 $(real_lim)
real_measured := $(foreach model,base sft ppo_ptx,$(R)/report/$(model).json)
$(R)/data/test/prompts_200.jsonl: $(R)/data/account.txt
	head -n 200 $(R)/data/test/prompts.jsonl > $@
$(real_measured): $(measuring) $(R)/data/test/prompts_200.jsonl $(R)/rm/model.safetensors $(R)/init/model.safetensors
$(R)/report/base.json: $(R)/base/model.safetensors
	$(real_measure) --name base --checkpoint $(R)/base --best_prefix --val_data $(R)/data/valid/prompts.jsonl
$(R)/report/sft.json: $(R)/sft/model.safetensors
	$(real_measure) --name sft --checkpoint $(R)/sft --resample --best_of 4
$(R)/report/ppo_ptx.json: $(R)/ppo_ptx/model.safetensors
	$(real_measure) --name ppo_ptx --checkpoint $(R)/ppo_ptx

$(R)/report/report.md: $(R)/ppo_ptx/model.safetensors evaluation/report.py evaluation/figures.py $(real_measured)
	$(py) evaluate.py report --measured $(real_measured) --baseline sft --out $(R)/report

# Human comparisons, five folds by prompt: the reward model beside two simple rules.
$(R)/folds/folds.md: evaluate.py evaluation/folds.py train_rm.py $(R)/sft/model.safetensors
	$(half) $(py) evaluate.py folds --folds 5 --init $(R)/sft --out $(R)/folds --seed $(SEED) \
	  --comparisons $(foreach s,train valid test,$(R)/data/$(s)/comparisons.jsonl) \
	  --rm_flags "$(real_rm)" $(real_lim)

# The paper's automatic evaluation on the public sets that lie in DATA.
public: $(R)/public/report.md
	@echo "The alignment-tax table is $(R)/public/table.txt, the report $(R)/public/report.md."

$(R)/public/report.md: evaluate.py evaluation/public.py data/real/public_sets.py data/real/public_items.py \
                       data/real/text_metrics.py data/real/toxicity.py data/real/raw.py data/files.py \
                       model.py checkpoint.py sample.py evaluation/report.py evaluation/figures.py evaluation/measure.py \
                       $(R)/ppo/model.safetensors $(R)/ppo_ptx/model.safetensors
	@test -n "$(DATA)" || { echo "error: give DATA=<folder of raw data sets>" >&2; exit 2; }
	$(half) $(py) evaluate.py public --data $(DATA) --out $(R)/public --seed $(SEED) \
	  --checkpoints base=$(R)/base sft=$(R)/sft ppo=$(R)/ppo ppo_ptx=$(R)/ppo_ptx
	$(call record,$(R)/public,DATA)

# ------------------------------------------------------------------------------------------------
# GPT-2 on one GPU, on real data: from downloads to the report, one stage at a time.
#
#   make gpt2 SIZE=gpt2-medium           everything, into out/gpt2-medium
#   make gpt2 DATA=FOLDER                takes copies that lie in FOLDER instead of downloading
#   make out/gpt2/candidates.jsonl       responses of its own models, which a person can rank:
#                                        python -m data.label --interactive --data ... --out RANKED
#   make gpt2 COMPARISONS=RANKED         the reward model learns from these
#
# Batches, minibatches and kl_coef are the paper's, and so are the rates of the value network and of
# the largest SFT and reward models (C.1, C.2); the policy's are within what it tried (C.4, E.9),
# smaller models take larger ones, and none is tuned. What fits into which memory:
# python -m tests.throughput --plan

SIZE        ?= gpt2
#              SFT             RM              PPO
#              lr      micro   lr      micro   lr      micro   rollout
gpt2        := 5e-5    8       3e-5    2       1.5e-5  8       128
gpt2-medium := 3e-5    8       2e-5    2       1e-5    4       64
gpt2-large  := 2e-5    16      1.5e-5  4       8e-6    16      64
gpt2-xl     := 9.65e-6 16      9e-6    4       5e-6    8       64
sizes       := gpt2 gpt2-medium gpt2-large gpt2-xl
ifneq ($(words x$(SIZE)x) $(words $(filter $(sizes),$(SIZE))),1 1)
$(error SIZE="$(SIZE)": expected one of $(sizes))
endif
of_size      = $(word $(1),$($(SIZE)))
G           := $(OUT)/$(SIZE)
COMPARISONS ?= $(G)/data/train/comparisons.jsonl
gpt2_lim    := --seed $(SEED) --device cuda --dtype bfloat16 --max_prompt_tokens 512 --max_new_tokens 256
gpt2_run     = $(gpt2_lim) $(if $(filter %-large %-xl,$(SIZE)),--grad_checkpointing) $(resume)
gpt2_copies := $(if $(DATA),--from $(DATA))
$(if $(filter gpt2 $(G)/%,$(goals)),$(call begun,$(G),SEED))
$(if $(filter gpt2 $(foreach s,rm sft_selected ppo_ptx report,$(G)/$(s)/%),$(goals)),$(call begun,$(G)/rm,COMPARISONS))

.PHONY: gpt2
gpt2: $(G)/report/report.md
	@cat $(G)/report/table.txt
	@echo "The report is $(G)/report/report.md."

# Weights (0.5, 1.5, 3.2 or 6.4 GB) and data sets go to data/downloads, each with its checksum. The
# novels stand for the pretraining data, which GPT-2's makers did not publish.
$(G)/data/downloaded: | .venv/ready
	$(py) -m data.real.prepare --download gpt2-bpe $(SIZE) alpaca oasst hh-rlhf novels $(gpt2_copies)
	@mkdir -p $(@D)
	@touch $@

$(G)/data/account.txt: data/real/prepare.py data/real/convert.py $(G)/data/downloaded
	$(py) -m data.real.prepare alpaca oasst hh-rlhf novels --out $(G)/data --seed $(SEED)
	$(call record,$(G),SEED)

$(G)/data/valid/prompts_200.jsonl $(G)/data/test/prompts_200.jsonl: %_200.jsonl: $(G)/data/account.txt
	head -n 200 $*.jsonl > $@

gpt2_sft = $(py) train_sft.py --init $(SIZE) --data $(G)/data/train/demonstrations.jsonl \
             --val_data $(G)/data/valid/demonstrations.jsonl $(gpt2_run) --batch_size 32 \
             --lr $(call of_size,1) --micro_batch_size $(call of_size,2) --save_every 1000
$(call weights,$(SIZE)/sft): train_sft.py $(G)/data/account.txt
	$(gpt2_sft) --out $(G)/sft --epochs 3
$(call weights,$(SIZE)/init): train_sft.py $(G)/data/account.txt | $(call weights,$(SIZE)/sft)
	$(gpt2_sft) --out $(G)/init --epochs 2 --no-epoch_checkpoints \
	  --pretrain_data $(G)/data/train/pretrain.txt --pretrain_fraction 0.1

$(G)/candidates.jsonl: sample.py $(call weights,$(SIZE)/sft) $(call weights,$(SIZE)/init)
	$(py) sample.py --data $(G)/data/train/prompts.jsonl --num_prompts 500 --num_responses 4 9 --out $@ \
	  --checkpoints sft=$(G)/sft init=$(G)/init --shares 0.8 0.2 $(gpt2_lim)

# People's rankings of other models' responses (OASST, HH-RLHF), unless COMPARISONS says otherwise.
$(call weights,$(SIZE)/rm): train_rm.py $(call weights,$(SIZE)/sft) $(wildcard $(COMPARISONS)) \
                            | $(call weights,$(SIZE)/init)
	$(py) train_rm.py --init $(G)/sft --out $(G)/rm --data $(COMPARISONS) \
	  --val_data $(G)/data/valid/comparisons.jsonl --demonstrations $(G)/data/train/demonstrations.jsonl \
	  $(gpt2_run) --epochs 1 --batch_size 64 --lr $(call of_size,3) --micro_batch_size $(call of_size,4) \
	  --save_every 1000
	$(call record,$(G)/rm,COMPARISONS)

$(call weights,$(SIZE)/sft_selected): evaluate.py $(call weights,$(SIZE)/rm)
	$(py) evaluate.py select --run $(G)/sft --reward_model $(G)/rm --out $(G)/sft_selected \
	  --data $(G)/data/valid/prompts.jsonl $(gpt2_lim)

$(call weights,$(SIZE)/ppo_ptx): train_ppo.py $(call weights,$(SIZE)/rm) $(call weights,$(SIZE)/init) \
                                 $(G)/data/valid/prompts_200.jsonl | $(call weights,$(SIZE)/sft_selected)
	$(py) train_ppo.py --init $(G)/init --reward_model $(G)/rm --out $(G)/ppo_ptx \
	  --data $(G)/data/train/prompts.jsonl --val_data $(G)/data/valid/prompts_200.jsonl \
	  --pretrain_data $(G)/data/train/pretrain.txt --ptx_coef 1 --ptx_ratio 1 --ptx_tokens 512 \
	  $(gpt2_run) --kl_coef 0.02 --batch_size 512 --num_minibatches 8 --responses_per_prompt 1 \
	  --max_steps 500 --warmup_steps 10 --ema 0.992 --lr $(call of_size,5) --value_lr 9e-6 \
	  --micro_batch_size $(call of_size,6) --rollout_size $(call of_size,7) --eval_every 50 \
	  --save_every 100

gpt2_measure = $(py) evaluate.py measure --out $@ --reward_model $(G)/rm --reference $(G)/init \
                 --data $(G)/data/test/prompts_200.jsonl --pretrain_data $(G)/data/test/pretrain.txt \
                 $(gpt2_lim)
gpt2_measured := $(foreach model,base sft ppo_ptx,$(G)/report/$(model).json)
$(gpt2_measured): $(measuring) $(G)/data/test/prompts_200.jsonl $(call weights,$(SIZE)/ppo_ptx)
$(G)/report/base.json:
	$(gpt2_measure) --name base --checkpoint $(SIZE) --best_prefix \
	  --val_data $(G)/data/valid/prompts_200.jsonl
$(G)/report/sft.json: $(call weights,$(SIZE)/sft_selected) | $(G)/report/base.json
	$(gpt2_measure) --name sft --checkpoint $(G)/sft_selected --resample
$(G)/report/ppo_ptx.json: | $(G)/report/sft.json
	$(gpt2_measure) --name ppo_ptx --checkpoint $(G)/ppo_ptx

$(G)/report/report.md: evaluation/report.py $(gpt2_measured)
	$(py) evaluate.py report --measured $(gpt2_measured) --baseline sft --out $(G)/report
