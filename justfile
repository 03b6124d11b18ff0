# Recipes; `just` comes with the dev extra (rust-just). Variables: just model=Qwen/Qwen3-0.6B replicate
model := "pocket"
behaviour := "sycophancy"
adapter := "lora"
out := "out"
python := ".venv/bin/python"
ws := python + " -m ws"
run := "--model " + model + " --behaviour " + behaviour + " --adapter " + adapter + " --out " + out

default:
    @just --list

# create .venv with everything for development
setup:
    python3.11 -m venv .venv
    .venv/bin/pip install -q -c constraints.txt -e '.[dev]'

# the whole pipeline on a random two-layer model, with run-time shape checks
smoke:
    BEARTYPE=1 {{ws}} smoke

# data, train pos, train neg, diff, eval, alignment, report
replicate:
    {{ws}} replicate {{run}}

# sample the pairs of a run
data:
    {{ws}} data {{run}}

# fit one branch: just train neg
train sign="pos":
    {{ws}} train --sign {{sign}} {{run}}

# subtract the two adapters
diff:
    {{ws}} diff {{run}}

# the behaviour's own held-out probe on an existing run
eval-syco:
    {{ws}} eval sycophancy --alphas -2 -1 0 1 2 {{run}}

# the dilemmas on an existing run
eval-dilemmas:
    {{ws}} eval dilemmas --alphas -1 0 1 {{run}}

# all adapter families, three seeds
adapter-sweep:
    {{ws}} sweep --families lora dora pissa delora oft ia3 --seeds 0 1 2 --model {{model}} --behaviour {{behaviour}} --out {{out}}

# weight directions, activation steering, prompts and controls on identical rows
compare:
    {{ws}} compare --seeds 0 1 2 --model {{model}} --behaviour {{behaviour}} --out {{out}}

# where in the weights the behaviour lives; needs the runs of adapter-sweep
ablate:
    {{ws}} ablate --families lora delora --model {{model}} --behaviour {{behaviour}} --out {{out}}

# the strengths at which a run's direction spends a KL budget
calibrate:
    {{ws}} calibrate {{run}}

# where the direction lies in the weights
subspace-align:
    {{ws}} subspace {{run}}

# a catalogue of subspaces against what LoRA and DeLoRA change, three seeds
subspace-bases:
    {{ws}} subspace --bases all --families lora delora --seeds 0 1 2 --model {{model}} --behaviour {{behaviour}} --out {{out}}

# ours and the peers on the same work; needs the bench extra: just bench --quick
bench *arguments:
    {{python}} benchmarks/run.py {{arguments}}

# tests, lint, types and the import contract
check:
    .venv/bin/ruff check src tests docs benchmarks
    .venv/bin/ruff format --check src tests docs benchmarks
    .venv/bin/mypy
    .venv/bin/lint-imports
    .venv/bin/python -m pytest -q

# known vulnerabilities of the pinned packages; needs pip-audit and the internet
audit:
    pip-audit --no-deps --disable-pip -r constraints.txt

# remove runs
clean:
    rm -rf {{out}}
