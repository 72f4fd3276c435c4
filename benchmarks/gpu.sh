#!/usr/bin/env bash
# benchmarks/gpu.sh first|second OUT [--small]
#
# What only a card can tell, in two halves of at most seven minutes each on one GPU. The machine needs Python 3.12 with
# JAX 0.11, Flax 0.12.10 and Optax, and no network: `make gpu-kit` collects the rest as wheels in .gpu/wheels, which are
# put beside it here. Every figure is printed; traces, metrics and CSV rows stay in OUT. Each part has a limit of its
# own, so that one that hangs does not take the rest.
#
#   first   a profile's windows and saves in one run, and the losses of it against a run without; what the reader makes
#           of the trace; kernels of attention against plain float32; what XLA's kernels reach; the calibration
#   second  whole steps: ours (and as a first half's calibration in OUT estimates them), plain JAX's three, PyTorch's; the
#           loop beside the compiled step
#
# --small runs all of it on the CPU in a minute or two, to try the script.
set -u
half=${1:?first or second}; out=${2:?a folder for what is worth keeping}; small=${3:-}
root=$(cd "$(dirname "$0")/.." && pwd); here=$root/benchmarks/gpu
mkdir -p "$out"; out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
if [ -d "$root/.gpu/wheels" ] && ! "$python" -c "import meshwright.runtime" 2>/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$root"/.gpu/wheels/*.whl || exit 1
    export PYTHONPATH=$site
fi
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
meshwright=("$python" -m meshwright.runtime.cli)
compared=${XDG_CACHE_HOME:-$HOME/.cache}/meshwright/kernels.json
failed=0
cd "$(mktemp -d)" || exit 1

say() { echo "### $(date +%T) $*"; }
# part SECONDS FILE COMMAND...: run under a limit, print, keep what was printed.
part() {
    local limit=$1 file=$2; shift 2
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$file" | cut -c1-240
    local code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || { echo "exit $code: $*"; failed=1; }
}

if [ -n "$small" ]; then
    export JAX_PLATFORMS=cpu
    shape=(topology=cpu:1 "mesh={fsdp: 1}" model.preset=tiny "model.overrides={layers: 2, embed: 32, heads: 2, kv_heads: 2, head_dim: 16, mlp: 64}" data.sequence=32)
    deep=("${shape[@]}" train.global_batch=4); whole=("${deep[@]}"); bare=(4 32); steps=3; timed=6; flag=(--small)
else
    deep=(model.preset=llama3-1b "model.overrides={compute_dtype: bfloat16, layers: 4}" data.sequence=4096 train.global_batch=4)
    whole=(model.preset=llama3-1b "model.overrides={compute_dtype: bfloat16}" data.sequence=4096 train.global_batch=8)
    bare=(8 4096); steps=10; timed=45; flag=()
fi
cat > config.yaml <<YAML
name: gpu
plan: auto
data: {source: stdlib, cache: $PWD/tokens}
train: {steps: 60, evaluate_every: 0, check_accumulation: false}
optimizer: {learning_rate: 3.0e-4, warmup_steps: 5, schedule: constant}
checkpoint: {every: 0}
metrics: {console: lines, console_every: 20}
compilation_cache: $PWD/compiled
YAML
[ -n "$small" ] && sed -i '/^plan:/d' config.yaml
train() { # train SECONDS FILE RUN OVERRIDES...
    local limit=$1 file=$2 run=$3; shift 3
    part "$limit" "$file" "${meshwright[@]}" train config.yaml "${deep[@]}" "run=$PWD/$run" "$@"
}

say "device"
part 60 device.txt "${meshwright[@]}" doctor
[ -n "$small" ] || part 20 card.txt nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

if [ "$half" = first ]; then
    say "60 steps without a profile"; train 90 plain.txt plain
    say "the same with two windows and three saves"
    train 90 windows-1.txt windows train.steps=30 checkpoint.every=20 profile.start_step=10 profile.num_steps=3
    train 90 windows-2.txt windows train.steps=60 checkpoint.every=20 profile.start_step=40 profile.num_steps=3
    part 20 losses.txt "$python" "$here/summary.py" losses windows plain
    say "what the reader makes of the last window"
    part 40 profile.txt "${meshwright[@]}" profile windows
    part 40 profile.json "${meshwright[@]}" profile windows --json > /dev/null
    for trace in windows/profile/plugins/profile/*/*.xplane.pb; do
        gzip -9 -c "$trace" > "$out/$(basename "$(dirname "$trace")").xplane.pb.gz"
    done
    cp windows/metrics.jsonl "$out/windows.metrics.jsonl"
    say "kernels of attention against plain float32"; part 90 values.txt "${meshwright[@]}" doctor --kernels
    cp "$compared" "$out/" 2>/dev/null
    say "what kernels of XLA reach"; part 90 kernels.jsonl "$python" "$here/kernels.py" "${flag[@]}"
    say "the card's calibration, by loops and then by the trace"
    part 75 calibrate.txt "${meshwright[@]}" calibrate --seconds "$timed" --out "$out/calibration.json"
    part 40 calibrate-traced.txt "${meshwright[@]}" profile windows --calibrate --out "$out/calibration.json"
elif [ "$half" = second ]; then
    rows=$out/rows.csv
    # What the first half found right is taken for packed rows here, too.
    [ -f "$out/kernels.json" ] && mkdir -p "$(dirname "$compared")" && cp "$out/kernels.json" "$compared"
    step() { # step NAME OVERRIDES...
        local name=$1; shift
        part 90 "step-$name.json" "$python" "$here/step.py" config.yaml --way "$name" "$@" --rows "$rows" --steps "$steps"
    }
    say "whole steps: ours, packed; and with products and look-ups as JAX does them"
    step whole "${whole[@]}"; step whole-jax "${whole[@]}" arithmetic=jax
    if [ -f "$out/calibration.json" ]; then
        say "the same, as estimated by the card's own calibration"
        part 40 plan.txt "${meshwright[@]}" plan config.yaml "${whole[@]}" "calibration=$out/calibration.json"
    fi
    say "plain JAX without segments"
    for remat in none dots full; do
        part 60 "bare-$remat.json" "$python" "$here/bare.py" "${bare[@]}" "$remat" "${flag[@]}"
    done
    if [ -z "$small" ]; then
        say "PyTorch without segments"
        if "$python" -c "import torch, transformers" 2>/dev/null; then
            part 90 torch.json "$python" "$here/torch_llama.py" "${bare[@]}"
        else
            echo "torch or transformers is not here: left out"
        fi
        say "more of ours; the second with a vocabulary of 50,257 not padded"
        step gpt-125m model.preset=gpt-125m "model.overrides={compute_dtype: bfloat16}" data.sequence=1024 train.global_batch=64
        step gpt-125m-jax model.preset=gpt-125m "model.overrides={compute_dtype: bfloat16}" data.sequence=1024 train.global_batch=64 arithmetic=jax
        step 8b-layers model.preset=llama3-8b "model.overrides={compute_dtype: bfloat16, layers: 4}" data.sequence=8192 train.global_batch=4
    fi
    say "the loop beside the compiled step"
    step deep "${deep[@]}"
    train 90 loop.txt loop train.steps=40
    part 20 overhead.txt "$python" "$here/summary.py" loop loop "$rows" deep
    cp loop/prediction.json "$out/" 2>/dev/null
else
    echo "$half is neither first nor second"; exit 2
fi
say "done: $(ls "$out" | wc -l) files in $out"
exit $failed
