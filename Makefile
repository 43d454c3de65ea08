# make demo | test | lint | format | sanitize | test-debian | clean
# All that is made lands in $(VENV) and build/. PYTHON: any CPython >= 3.10.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=

bin := $(VENV)/bin
stamps := $(VENV)/stamps
pip_install := PATH="$(abspath $(bin)):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	$(bin)/python -m pip install --quiet --disable-pip-version-check
# The build requirements are in the environment, so that a second build compiles what changed.
install_project := . $(stamps)/headers && $(pip_install) --no-build-isolation \
	--config-settings=build-dir="$(abspath $(VENV))/build"
cmake_python := -DPython_EXECUTABLE="$(abspath $(bin))/python" \
	-DCMAKE_MAKE_PROGRAM="$(abspath $(bin))/ninja"
sources := pyproject.toml CMakeLists.txt LICENSE THIRD_PARTY_NOTICES.md README.md \
	$(shell find csrc python -not -path '*/__pycache__*')
cpp_folders := $(wildcard csrc cpp_tests bench)

.PHONY: demo test test-python test-cpp lint format sanitize test-debian clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(stamps)/project
	@$(bin)/bicache demo $(DEMO_ARGS)

test: test-python test-cpp
	@$(bin)/python tools/test_summary.py pytest=build/pytest.xml ctest=build/ctest.xml

test-python: $(stamps)/test
	@rm -f build/pytest.xml
	$(bin)/python -m pytest --junitxml=build/pytest.xml $(PYTEST_ARGS)

test-cpp: $(stamps)/tools
	@rm -f build/ctest.xml
	@tools/apt_need.sh libgtest-dev
	$(bin)/cmake --preset release -B build/cpp $(cmake_python) -DBICACHE_BUILD_PYTHON=OFF
	$(bin)/cmake --build build/cpp --parallel $(JOBS)
	$(bin)/ctest --test-dir build/cpp --output-on-failure --no-tests=error --parallel $(JOBS) \
		--output-junit "$(CURDIR)/build/ctest.xml"

lint: $(stamps)/lint
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	find $(cpp_folders) -name '*.h' -o -name '*.cc' | xargs $(bin)/clang-format --dry-run -Werror

format: $(stamps)/lint
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	find $(cpp_folders) -name '*.h' -o -name '*.cc' | xargs $(bin)/clang-format -i

# ThreadSanitizer maps its memory at fixed addresses, which address randomisation may take.
sanitize: $(stamps)/tools
	@tools/apt_need.sh libgtest-dev
	set -e; for preset in asan tsan; do \
		$(bin)/cmake --preset $$preset $(cmake_python); \
		$(bin)/cmake --build --preset $$preset --parallel $(JOBS); \
		fixed=; if setarch -R true 2> /dev/null; then fixed="setarch -R"; fi; \
		$$fixed $(bin)/ctest --preset $$preset --parallel $(JOBS); \
	done

test-debian:
	@tools/apt_need.sh cmake pybind11-dev python3-dev python3-numpy libopenblas-dev libgtest-dev
	/usr/bin/cmake --preset debian
	/usr/bin/cmake --build --preset debian --parallel $(JOBS)
	/usr/bin/ctest --preset debian --parallel $(JOBS)
	PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=build/debian/package /usr/bin/python3 tests/smoke_debian.py

clean:
	rm -rf build $(VENV)

$(stamps)/venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
		"[make] PYTHON: expected CPython >= 3.10, got %d.%d" % v[:2])'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(stamps) build
	@touch $@

$(stamps)/tools: pyproject.toml $(stamps)/venv
	@sed -n '/^requires = \[/,/^\]/s/^ *"\(.*\)",*$$/\1/p' pyproject.toml > $(stamps)/requirements
	@test -s $(stamps)/requirements
	@echo "Installing the build requirements"
	@$(pip_install) -r $(stamps)/requirements
	@touch $@

$(stamps)/headers: $(stamps)/venv
	@tools/python_headers.sh $(bin)/python "$(abspath $(VENV))/python-headers" > $@

$(stamps)/project: $(sources) $(stamps)/headers $(stamps)/tools
	@echo "Building and installing bicache"
	@$(install_project) .
	@touch $@

$(stamps)/test: pyproject.toml $(stamps)/project
	@echo "Installing $(TORCH) and the test tools"
	@$(pip_install) '$(TORCH)'
	@$(install_project) '.[test]'
	@touch $@

$(stamps)/lint: pyproject.toml $(stamps)/tools $(stamps)/headers
	@echo "Installing the lint tools"
	@$(install_project) '.[lint]'
	@touch $@
