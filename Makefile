# `make demo` and `make test` set themselves up in .venv on a fresh machine; nothing outside this folder is touched.
#   make demo TORCH="torch==2.0.1 numpy==1.26.4"   another torch, from 2.0 on (before 2.3 with numpy 1)
#   make test PYTHON=python3.10          another Python; one that has torch already lends it to .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/python
OUT ?= runs/demo
SEEDS ?= 5
# A torchvision of PyPI can then be imported beside another build of torch.
SITE := PYTHONPATH="$(CURDIR)/tests/hosts/site$${PYTHONPATH:+:$$PYTHONPATH}"

.PHONY: demo seeds clusters benchmark attack test test-backends test-hosts lint docs docs-serve build/api clean
demo: $(VENV)/ready
	$(RUN) -m examples.demo --out $(OUT)

seeds: $(VENV)/ready
	$(RUN) -m examples.demo.seeds --seeds $(SEEDS) --out runs/seeds

clusters: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m examples.clusters --seeds $(SEEDS) --out runs/clusters

benchmark: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) benchmarks/reference_step.py

# Crafted and mutated files, kills and interrupts; about five minutes.
attack: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) benchmarks/attack.py

# Two processes, each test file in one of them.
test: $(VENV)/ready
	$(SITE) OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

# What `make test` skips for want of open_clip, timm and pydensecrf: every kind of CLIP of docs/clips.md, and the CRF.
test-backends: $(VENV)/backends
	$(SITE) OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -rs tests/test_clip_*.py tests/test_crf.py

# Without their dependencies, so that no other torch comes along; the rest of them is there. pydensecrf2 needs a compiler.
$(VENV)/backends: $(VENV)/ready
	$(RUN) -m pip install --quiet --no-deps open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.28.0
	$(RUN) -m pip install --quiet pydensecrf2 || echo "pydensecrf2 did not build; its tests are skipped"
	touch $@

# The real baselines: MCTFORMER=dir WEAKTR=dir TRANSCAM=dir ... VOC_PHOTOS=dir, see tests/hosts/README.md
test-hosts: $(VENV)/hosts
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/hosts -rs

$(VENV)/hosts: $(VENV)/ready
	$(RUN) -m pip install --quiet --no-deps timm==1.0.31 torchvision==0.28.0
	$(RUN) -m pip install --quiet -r tests/hosts/requirements.txt
	touch $@

lint: $(VENV)/ready
	$(RUN) -m pip install --quiet ruff mypy "import-linter>=2.17"
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf build/lint && mkdir -p build/lint && cp -r semples_plugin build/lint/ && cp -r adapters build/lint/semples_plugin/
	$(RUN) -m mypy build/lint/semples_plugin
	cd build/lint && PYTHONPATH=. $(abspath $(VENV))/bin/lint-imports ../../setup.cfg

# The pages of docs/ as a site in build/site; a warning is an error. The API pages read the package as it is installed.
docs: $(VENV)/docs build/api
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

docs-serve: $(VENV)/docs build/api
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve

build/api:
	rm -rf $@ && mkdir -p $@/semples_plugin
	ln -sfn $(abspath $(wildcard semples_plugin/*)) $@/semples_plugin/
	ln -sfn $(abspath adapters) $@/semples_plugin/adapters

$(VENV)/docs: $(VENV)/ready
	$(RUN) -m pip install --quiet --editable ".[docs]"
	touch $@

# An installed torch is used as it is; otherwise one pinned release, so that no newer one with other needs slips in.
$(VENV)/ready: setup.cfg
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable ".[demo,test]" $(filter numpy%,$(TORCH))
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
