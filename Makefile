# Every target creates `.venv` first if it is missing or older than what it is made from; nothing else is needed on
# the machine than Python 3.10 or later, g++ and make. `make PYTHON=python3.12 ...` takes another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Flags for pytest, such as `make test PYTEST_ARGS="-x -k layout"`, or `PYTEST_ARGS="-n0 --pdb"`: in one process.
PYTEST_ARGS ?=
# A process for each core; the tests of a file go to the same one, and share what they have set up.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
TRAIN_CONFIG ?= configs/gpt_nvme.yaml
# Number of compile and test jobs. A large machine is not taken whole: a sanitized compile needs up to 1 GB a job.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -le 8 ] && echo "$$n" || echo 8)

CXX_SOURCES = $(shell find ops tests/simdevice -name '*.cpp' -o -name '*.h')
# The package is installed in place (editable), so only what is compiled makes an installation stale.
BUILD_INPUTS := pyproject.toml constraints.txt $(shell find ops \( -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt \) \
	-not -path '*/tests/*')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test test-slow test-ops test-ops-arm64 test-ops-x86 sanitize lint format bench clean distclean

help:  ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*##  *\(.*\)/  make \1|\2/p' Makefile | awk -F '|' '{ printf "%-20s %s\n", $$1, $$2 }'

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# constraints.txt pins what is installed here; PIP_BUILD_CONSTRAINT has it pin what the build itself uses (older pips
# ignore it). cmake is for the C++ tests: the build of the extension brings its own.
# Where only C++ files changed, there are no dependencies to look at.
$(VENV)/.installed: $(VENV)/.created $(BUILD_INPUTS)
	PIP_BUILD_CONSTRAINT=constraints.txt $(PIP) install --quiet --progress-bar off -c constraints.txt \
		$(if $(filter-out ops/%,$?),-e '.[dev]',--no-deps -e .)
	touch $@

install: $(VENV)/.installed  ## Create .venv and install the package and its tools in it

train: $(VENV)/.installed  ## Train a small GPT with its state on disk (about 3 minutes on 2 cores)
	$(BIN)/python examples/gpt/train.py fit --config $(TRAIN_CONFIG)

test: $(VENV)/.installed  ## Run the Python tests, less the slow ones
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-slow: $(VENV)/.installed  ## Run the slow Python tests
	$(PYTEST) -m slow $(PYTEST_ARGS)

comma := ,
# $(1): build folder, $(2): build type, $(3): sanitizers, $(4): command before ctest, $(5): more options for cmake
define ctest
	$(BIN)/cmake -S ops -B build/$(1) -DCMAKE_BUILD_TYPE=$(2) -DZINF_PYTHON=OFF -DZINF_TESTS=ON -DZINF_SANITIZE=$(3) $(5)
	MAKEFLAGS=--no-print-directory $(BIN)/cmake --build build/$(1) --parallel $(JOBS)
	$(4) $(BIN)/ctest --test-dir build/$(1) --output-on-failure --no-tests=error --parallel $(JOBS) --timeout 180
endef

test-ops: $(VENV)/.installed  ## Run the C++ tests
	$(call ctest,ops,Release,,)

test-ops-arm64: emulated-aarch64  ## Run the C++ tests as arm64 programs, in an emulator
test-ops-x86: emulated-x86_64  ## The same as x86-64 programs, on the CPU that QEMU_CPU names

# Static, so that no library of the other architecture is needed to run them.
emulated-%: $(VENV)/.installed
	@for tool in $*-linux-gnu-g++ qemu-$*; do command -v $$tool > /dev/null || { echo "$$tool is not here: install" \
	"Debian's packages g++-$(subst _,-,$*)-linux-gnu and qemu-user, or what they are called elsewhere" >&2; exit 1; }; done
	$(call ctest,ops-$*,Release,,,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$* \
		-DCMAKE_CXX_COMPILER=$*-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-$*)

# A report is a failure. ThreadSanitizer cannot start where the kernel randomizes addresses by more bits than it knows
# (Linux 6.6 and later against g++ 13 and earlier), so its tests run without randomization, where that is allowed.
NO_ASLR := $(shell setarch "$$(uname -m)" -R true 2>/dev/null && echo setarch "$$(uname -m)" -R)
sanitize: $(VENV)/.installed  ## Run the C++ tests under address and undefined, then under thread sanitizers
	$(call ctest,ops-asan,RelWithDebInfo,address$(comma)undefined,UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1)
	$(call ctest,ops-tsan,RelWithDebInfo,thread,TSAN_OPTIONS=halt_on_error=1 $(NO_ASLR))

lint: $(VENV)/.installed  ## Check style, format and types; change nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.installed  ## Rewrite the files in the style that `make lint` checks
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.installed  ## Run the benchmarks, one after another; each has more options, see its --help
	set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:  ## Remove what was built, and the caches of the tools
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv/.installed
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv, logged runs and offload files too
	rm -rf $(VENV) runs lightning_logs zinf_nvme
