# make train   installs what is missing, builds, writes the built-in corpus, trains a small GPT, shows the result
# make         builds build/train, build/data and build/eval
# make test    builds and runs the tests
# make help    shows this
#
# make train ARGS="--rotary-fraction 1 --run full"     other flags: build/train --help
# make notebooks       executes notebooks/*.ipynb in place; ARGS=notebooks/NAME.ipynb for one of them
# make sweep   how much rotation does a model need: trains several fractions and seeds, writes runs/sweep/report.html (GPU)
# make sweep-cpu   the same in a quarter of an hour on 2 cores; both go on where they were stopped
# make nope    what makes a model without position unstable, what cures it: runs/nope/report.html (GPU, 6 min; QUICK=1: 2)
# make nope-cpu   how its attention logits grow; a quarter of an hour on 2 cores
# make length  how far does a model look that was trained on short windows: runs/length/report.html (GPU)
# make length-cpu   the same in a quarter of an hour on 2 cores
# make shakespeare     fetches a data set and trains on it: shakespeare, tinystories, wikitext, fineweb, fineweb-edu
# make bench   tokens per second and the time of each operation on the CPU; for a GPU see bench/README.md
#
# make ROTARY_DIM=6     the rotary dimension as a compile-time constant
# make DEBUG=1          -O0 -g, for stepping through
# make test SAN=1       under AddressSanitizer and UndefinedBehaviorSanitizer
# make ARCH=90          builds the CUDA part for compute capability 9.0; without ARCH, for the GPU of this machine
# make fuzz              every parser of files against libFuzzer, FUZZ_SECONDS=60 each: needs clang++
# make compile-cuda     compiles the CUDA part for several GPUs, without running it: needs nvcc, but no GPU

MAKEFLAGS += --jobs=$(shell nproc 2>/dev/null || echo 2)

ARGS ?=
CXX ?= g++
NVCC ?= nvcc
# The GPU's compute capability, e.g. 90, or several; empty where there is no GPU, or no nvcc: then the programs are CPU only.
ARCH ?= $(shell command -v $(NVCC) >/dev/null 2>&1 && nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)

BUILD := build$(if $(DEBUG),-debug)$(if $(SAN),-san)$(if $(ROTARY_DIM),-rotary$(ROTARY_DIM))

# -fno-math-errno and -fno-trapping-math let loops with sqrt and rounding be vectorised; unlike -ffast-math they change
# no result and keep NaN checks.
# GCC's -O2, with what training gains of -O3: as fast, and less to compile. clang does not know them.
FAST := $(if $(findstring clang,$(shell $(CXX) --version 2>/dev/null)),-O3,-O2 -ftree-vectorize -fvect-cost-model=dynamic -fpeel-loops -fno-inline-small-functions)
OPTIMISE := $(if $(DEBUG),-O0 -g,$(if $(SAN),-O1 -g,$(FAST) -march=native -fno-math-errno -fno-trapping-math))
comma := ,
SANITIZE := $(if $(SAN),-fsanitize=address$(comma)undefined -fno-sanitize-recover=all)
CPPFLAGS += -I. -I$(BUILD) $(addprefix -isystem ,/usr/include/eigen3 /usr/local/include/eigen3 /opt/homebrew/include/eigen3) $(if $(ROTARY_DIM),-DROTARY_DIM=$(ROTARY_DIM)) $(if $(DEBUG),-DDEBUG)
CXXFLAGS += -std=c++17 -Wall -Wextra -fopenmp $(SANITIZE)

# One way to make a program from its sources, with the compiler that the machine has.
ifeq ($(ARCH),)
  COMPILE = $(CXX) $(CPPFLAGS) $(CXXFLAGS) $(OPTIMISE) -MMD -MP -x c++ -c $< -o $@
  LINK = $(CXX) $(CXXFLAGS) $(filter %.o,$^) -o $@ $(LDLIBS)
else
  # Hopper's own instructions (wgmma) exist for sm_90a only.
  GENCODE := $(foreach arch,$(ARCH:90=90a),-gencode arch=compute_$(arch)$(comma)code=sm_$(arch))
  COMPILE = $(NVCC) $(GENCODE) --threads 0 -std=c++17 $(if $(DEBUG),-G) $(CPPFLAGS) --diag-suppress=20012,20013,20014,20015 \
            $(addprefix -Xcompiler=,$(subst $(comma),\$(comma),$(filter-out -std=c++17,$(CXXFLAGS) $(OPTIMISE)))) -MMD -MP -x cu -c $< -o $@
  LINK = $(NVCC) $(GENCODE) $(addprefix -Xcompiler=,$(subst $(comma),\$(comma),-fopenmp $(SANITIZE))) $(filter %.o,$^) -o $@ $(LDLIBS) -lcublasLt
endif

# PCRE2 and utf8proc for tokenizers, libarchive for compressed text.
LDLIBS += -lpcre2-8 -lutf8proc -larchive

.PHONY: FORCE help all train test bench notebooks sweep sweep-cpu nope nope-cpu length length-cpu fuzz compile-cuda clean
all: $(BUILD)/train $(BUILD)/data $(BUILD)/eval

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

train: $(BUILD)/train $(BUILD)/data data/stories/meta.json
	@$(BUILD)/train --sample-every 250 $(ARGS)

data/stories/meta.json: | $(BUILD)/data
	$(BUILD)/data stories --out data/stories

# Flags of `data fetch` go through FETCH, those of `train` through ARGS.
DATA_SETS := shakespeare tinystories wikitext fineweb fineweb-edu
.PHONY: $(DATA_SETS)
$(DATA_SETS): %: $(BUILD)/train data/%/meta.json
	@$(BUILD)/train --data "data/$*/*train_*.bin" $(ARGS)
$(DATA_SETS:%=data/%/meta.json): data/%/meta.json: | $(BUILD)/data
	$(BUILD)/data fetch $* --out data/$* $(FETCH)

TESTS := $(patsubst tests/%.cpp,$(BUILD)/tests-%.o,$(wildcard tests/*.cpp))
test: $(BUILD)/tests $(BUILD)/train $(BUILD)/data $(BUILD)/eval
	@OMP_WAIT_POLICY=passive $(BUILD)/tests $(ARGS)
	@OMP_WAIT_POLICY=passive BUILD=$(BUILD) sh tests/commands.sh
	@if command -v python3 >/dev/null; then OMP_WAIT_POLICY=passive BUILD=$(BUILD) ROTARY_DIM=$(ROTARY_DIM) python3 tests/page.py; \
	else echo "page: skipped, there is no python3"; fi
	@OMP_WAIT_POLICY=passive BUILD=$(BUILD) sh tests/ranks.sh
	@if command -v python3 >/dev/null; then PYTHONDONTWRITEBYTECODE=1 python3 scripts/test_runner.py; fi
ifeq ($(ROTARY_DIM),)  # and what a program that is built for one R takes and refuses
	@$(MAKE) --no-print-directory ROTARY_DIM=6 TESTS='$$(addprefix $$(BUILD)/tests-,main.o rope.o flags.o)' \
	  $(BUILD)-rotary6/tests
	@OMP_WAIT_POLICY=passive $(BUILD)-rotary6/tests
endif

# What a fuzzer finds to be new it adds to build-fuzz/NAME/; a crash ends it, and leaves its input in build-fuzz/.
FUZZ_PARSERS ?= $(notdir $(wildcard tests/fuzz_corpus/*))
FUZZ_SECONDS ?= 60
fuzz: build-fuzz/fuzz
	@for parser in $(FUZZ_PARSERS); do \
	  mkdir -p build-fuzz/$$parser && echo "$$parser:" && \
	  PARSER=$$parser OMP_NUM_THREADS=1 build-fuzz/fuzz \
	    -max_total_time=$(FUZZ_SECONDS) -timeout=60 -max_len=8192 -print_final_stats=1 \
	    -artifact_prefix=build-fuzz/$$parser- build-fuzz/$$parser tests/fuzz_corpus/$$parser 2>build-fuzz/$$parser.log || \
	    { tail -30 build-fuzz/$$parser.log; exit 1; }; \
	  grep -E "^#.*DONE|number_of_executed" build-fuzz/$$parser.log; \
	done
build-fuzz/fuzz: tests/fuzz.cpp run/flags.cpp $(wildcard *.h *.cuh device/* text/* run/* eval/*) | $(BUILD)/ready
	@mkdir -p build-fuzz
	clang++ $(CPPFLAGS) -DLIBFUZZER -DDOCTEST_CONFIG_DISABLE -std=c++17 -O1 -g -fopenmp \
	  -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all tests/fuzz.cpp run/flags.cpp -o $@ $(LDLIBS)

# That all of it still compiles: for several GPUs the trainer, in whose object every kernel is, and the ladders; for the
# newest the CUDA tests as well, up to PTX. The host code counts as little as possible here.
CUDA_TESTS := $(patsubst tests/%.cpp,tests-%.o,$(shell grep -l tests/cuda.h tests/*.cpp))
compile-cuda:
	@$(MAKE) ARCH="75 80 90" BUILD=build-cuda OPTIMISE=-O0 $(addprefix build-cuda/,train attention_ladder.o matmul_ladder.o)
	@$(MAKE) ARCH=90 BUILD=build-cuda OPTIMISE=-O0 GENCODE="-gencode arch=compute_90a,code=compute_90a" \
	  $(addprefix build-cuda/,$(CUDA_TESTS))

bench: $(BUILD)/bench
	@$(BUILD)/bench $(ARGS)

# GCC 12 calls variables of its own AVX-512 header uninitialised where Eigen, which these two compare with, uses them.
$(BUILD)/tests-matmul.o $(BUILD)/bench.o: CXXFLAGS += -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option
$(BUILD)/tests: $(TESTS) $(BUILD)/flags.o
$(BUILD)/train: $(BUILD)/train.o $(BUILD)/flags.o
$(BUILD)/data: $(BUILD)/data.o
$(BUILD)/eval: $(BUILD)/eval.o $(BUILD)/flags.o
$(BUILD)/bench: $(BUILD)/bench.o $(BUILD)/flags.o
$(BUILD)/ops_gpu: $(BUILD)/ops_gpu.o
$(BUILD)/attention_gpu: $(BUILD)/attention_gpu.o
$(BUILD)/attention_ladder: $(BUILD)/attention_ladder.o
$(BUILD)/matmul_ladder: $(BUILD)/matmul_ladder.o
$(addprefix $(BUILD)/,tests train data eval bench ops_gpu attention_gpu attention_ladder matmul_ladder):
	$(LINK)

$(BUILD)/%.o: %.cu $(BUILD)/ready
	$(COMPILE)
$(BUILD)/%.o: %.cpp $(BUILD)/ready
	$(COMPILE)
$(BUILD)/%.o: run/%.cpp $(BUILD)/ready
	$(COMPILE)
$(BUILD)/%.o: bench/%.cpp $(BUILD)/ready
	$(COMPILE)
$(BUILD)/%.o: bench/%.cu $(BUILD)/ready
	$(COMPILE)
# Files that programs write, as strings: the Python of `eval export --with-code`, the page of `eval trace --html`.
$(BUILD)/eval.o $(BUILD)/tests-huggingface.o $(BUILD)/tests-fuzz.o build-fuzz/fuzz: $(BUILD)/python.h
$(BUILD)/python.h: scripts/modeling_partial_rope.py scripts/reference.py $(BUILD)/ready
	@for name in modeling_partial_rope reference; do \
	  printf 'inline const char* const k_%s_py = R"PYTHON(' $$name; cat scripts/$$name.py; echo ')PYTHON";'; done >$@
$(BUILD)/eval.o $(BUILD)/train.o $(BUILD)/tests-page.o $(BUILD)/tests-eval.o: $(BUILD)/page.h
$(BUILD)/flags.o $(BUILD)/data.o: | $(BUILD)/page.h  # else they come before train.o, which takes longest
$(BUILD)/page.h: eval/page.html $(BUILD)/ready
	@{ printf 'inline const char* const kPage = R"PAGE('; cat eval/page.html; echo ')PAGE";'; } >$@
# Little optimisation for what is compiled more often than it runs, tests, and where training spends no time: `data
# encode` is up to 6 % slower for it.
$(BUILD)/tests-%.o $(BUILD)/data.o $(BUILD)/flags.o: OPTIMISE := $(if $(DEBUG)$(SAN),$(OPTIMISE),-O1 -march=native)
# doctest's assertions as function calls.
$(BUILD)/tests-%.o: CPPFLAGS += -DDOCTEST_CONFIG_SUPER_FAST_ASSERTS
$(BUILD)/tests-%.o: tests/%.cpp $(BUILD)/ready
	$(COMPILE)

# Packages, checked once for a build directory and compiler. With another compiler than before, everything is built anew.
$(BUILD)/ready: scripts/install.sh FORCE
	@by="$(CXX) $$($(CXX) --version 2>&1 | head -1) $(ARCH)"; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$by" ] || [ scripts/install.sh -nt $@ ]; then \
	  sh scripts/install.sh "$(CXX)" && mkdir -p $(BUILD) && echo "$$by" >$@; fi

# Python, for plots and notebooks only: in a directory of its own.
PYTHON := build-python/bin/python
build-python/ready: scripts/requirements.txt scripts/python.sh
	@sh scripts/python.sh build-python
	@touch $@

# Notebooks, run in the environment of Python, use these programs and the rotation as a library for Python's ctypes.
notebooks: build-python/ready $(BUILD)/librope.so all data/stories/meta.json
	@$(PYTHON) scripts/run_notebooks.py $(ARGS)
$(BUILD)/librope.so: notebooks/rope_library.cpp $(BUILD)/ready
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) $(OPTIMISE) -MMD -MP -shared -fPIC -x c++ $< -o $@
# Studies: Python starts the trainings and draws what comes out. Their own flags go through ARGS, train's behind --.
STUDY := $(addprefix $(BUILD)/,train eval bench) build-python/ready
data/stories-20M/meta.json: | $(BUILD)/data
	$(BUILD)/data stories --bytes 20M --out data/stories-20M

sweep: $(STUDY) data/stories-20M/meta.json
	@$(PYTHON) scripts/test_study.py
	@BUILD=$(BUILD) $(PYTHON) scripts/sweep.py --data "$(or $(DATA),data/stories-20M/train_*.bin)" --context 512 \
	  --step-tokens 65536 --steps 2000 --lrs 0.002,0.004,0.008 --seeds 2 --confirm 12 \
	  --fractions 0,0:qk-norm,2,0.1,0.1:head,0.25,0.5,0.75,1:nope4,1 $(ARGS) $(SWEEP_MODEL)
SWEEP_MODEL ?= -- --layers 6 --width 256 --heads 4 --mlp-hidden 704 --warmup 200 --min-lr 0 --init-std 0.02 --val-tokens 400000
sweep-cpu: $(STUDY) data/stories/meta.json
	@$(PYTHON) scripts/test_study.py
	@BUILD=$(BUILD) $(PYTHON) scripts/sweep.py --name sweep-cpu --steps 900 --positions 131072 $(ARGS) $(CPU_MODEL)
CPU_MODEL := -- --device cpu --width 128 --heads 4 --mlp-hidden 256
nope: $(STUDY) data/stories-20M/meta.json
	@$(PYTHON) scripts/test_study.py
	@BUILD=$(BUILD) $(PYTHON) scripts/nope.py $(if $(QUICK),--recipe quick) $(if $(DATA),--data "$(DATA)") $(ARGS)
nope-cpu: $(STUDY) data/stories/meta.json
	@$(PYTHON) scripts/test_study.py
	@BUILD=$(BUILD) $(PYTHON) scripts/nope.py --recipe cpu --data "$(or $(DATA),data/stories/train_*.bin)" $(ARGS) -- --device cpu
length: $(STUDY) data/stories-20M/meta.json
	@$(PYTHON) scripts/test_study.py
	@BUILD=$(BUILD) $(PYTHON) scripts/length.py --data "$(or $(DATA),data/stories-20M/train_*.bin)" --context 512 \
	  --step-tokens 65536 --steps 2000 --lrs 0.002,0.004,0.008 --seeds 1 --confirm 3 $(ARGS) $(SWEEP_MODEL)
length-cpu: $(STUDY) data/stories/meta.json
	@$(PYTHON) scripts/test_study.py
	@BUILD=$(BUILD) $(PYTHON) scripts/length.py --name length-cpu --data "$(or $(DATA),data/stories/train_*.bin)" \
	  --fractions 0,2,0.1,0.1:head,1:nope4,1 --context 64 --step-tokens 1024 --steps 900 --tokens 32768 $(ARGS) $(CPU_MODEL)

clean:
	rm -rf build build-*

-include $(wildcard $(BUILD)/*.d)
