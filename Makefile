# Each command makes the environment in .venv when it is needed.

VENV_PYTHON := .venv/bin/python

# Jupyter's and matplotlib's settings stay in the environment too, and foreign packages out of it.
export JUPYTER_CONFIG_DIR := $(CURDIR)/.venv/etc/jupyter-user
export JUPYTER_DATA_DIR := $(CURDIR)/.venv/share/jupyter-user
export IPYTHONDIR := $(CURDIR)/.venv/etc/ipython
export JUPYTER_CONFIG_PATH := $(CURDIR)/scripts/jupyter$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))
export MPLCONFIGDIR := $(CURDIR)/.venv/etc/matplotlib
unexport PYTHONPATH PYTHONHOME

.PHONY: help lab test test-browser test-students test-grading book setup student assignments

help:
	@echo "make lab            open the course in JupyterLab"
	@echo "make test           check style, run the unit tests and every notebook"
	@echo "make test-browser   run every notebook in JupyterLab in a browser, and work its widgets"
	@echo "make test-students  run the students' copies of the notebooks"
	@echo "make test-grading   let nbgrader grade right and wrong answers to every exercise"
	@echo "make setup          only make the environment, in .venv"
	@echo "make book           build the course as a site, in build/book"
	@echo "make student        write the notebooks without their solutions, into build/student"
	@echo "make assignments    make a course for nbgrader, into build/assignments"

# Jupyter refuses to work for root unless it is told to; in containers there is often nobody else.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

lab: setup
	@$(VENV_PYTHON) -m jupyterlab $(ALLOW_ROOT) --ServerApp.root_dir=. notebooks/00_start_here.ipynb

# nbmake is for notebooks only; each process of the unit tests would take seconds to import it.
test: setup
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m pytest -p no:nbmake -n auto --maxprocesses 4 --dist loadfile tests
	$(VENV_PYTHON) -m pytest --nbmake notebooks

student: setup
assignments: .venv/grading-packages
student assignments:
	@$(VENV_PYTHON) scripts/assignments.py $@

test-students: setup
	$(VENV_PYTHON) -m pytest -n auto --maxprocesses 2 tests/students.py

test-grading: .venv/grading-packages
	$(VENV_PYTHON) -m pytest tests/grading.py

# The cache holds what was read without a warning, so it must not outlive one that was not mended.
book: .venv/book-packages
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -c docs -d build/book-cache . build/book || { rm -rf build/book-cache; exit 1; }
	@$(VENV_PYTHON) scripts/check_site.py build/book
	@echo "The site is in build/book; open build/book/index.html."

# Screenshots stay in build/browser.
test-browser: .venv/browser-packages
	@$(VENV_PYTHON) -m tests.browser.chromium
	$(VENV_PYTHON) -m pytest tests/browser/notebooks.py

# Packages on top of the environment's own. The file goes when the environment is made anew, and they with it.
.venv/book-packages: docs/requirements.lock | setup
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: the site needs Python 3.11 or newer, but .venv has 3.10; run: PYTHON=python3.11 make book")'
	@$(VENV_PYTHON) -m pip install --quiet --no-deps --no-input --disable-pip-version-check -r docs/requirements.lock
	@touch $@

.venv/grading-packages: scripts/requirements.lock | setup
	@$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: nbgrader needs Python 3.11 or newer, but .venv has 3.10; run: PYTHON=python3.11 make assignments")'
	@$(VENV_PYTHON) -m pip install --quiet --no-deps --no-input --disable-pip-version-check -r $<
	@touch $@

.venv/browser-packages: tests/browser/requirements.lock | setup
	@$(VENV_PYTHON) -m pip install --quiet --no-deps --no-input --disable-pip-version-check -r $<
	@touch $@

setup:
	@scripts/setup
