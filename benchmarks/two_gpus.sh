#!/usr/bin/env bash
# Checks that need two GPUs: two ranks over NCCL give the same answers as one, capture their decode steps as CUDA
# graphs, and exit cleanly while the graphs are alive. Prints a table; exits with 1 if a check fails.
#
#     benchmarks/two_gpus.sh [shape]        7B by default; DEVICE=cpu tests the script itself, with 110M
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
shape=${1:-$([ "$device" = cpu ] && echo 110M || echo 7B)}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=0

row() { printf '%-58s %s\n' "$1" "$2"; }
check() { if eval "$2"; then row "$1" ok; else row "$1" FAILED; failed=1; fi; }

answer() { # RANKS: the bundled chat model, greedy in float32, on so many ranks
    timeout 300 torchrun --nproc_per_node "$1" example_chat_completion.py --ckpt_dir models/small-chat \
        --tokenizer_path models/tokenizer.model --temperature 0 --dtype float32 --device "$device" \
        >"$out/answer$1" 2>"$out/errors$1"
}

for ranks in 1 2; do
    began=$(date +%s)
    check "the chat example ends on $ranks rank(s)" "answer $ranks"
    row "  seconds, with start and exit" $(($(date +%s) - began))
done
check "two ranks answer as one does" "cmp -s $out/answer1 $out/answer2"
check "every rank records its decode steps" "! grep -q 'without CUDA graphs' $out/errors2"

for ranks in 1 2; do
    torchrun --nproc_per_node "$ranks" -m llama bench --shape "$shape" --dtype bfloat16 --device "$device" \
        --prompts 512 --batches 1,8 >"$out/bench$ranks" 2>"$out/bench_errors$ranks" || { tail "$out/bench_errors$ranks"; failed=1; }
    row "$shape in bfloat16 on $ranks rank(s)" ""
    grep -E '^ .*(prefill|batch|load)' "$out/bench$ranks" || true
done
check "no rank fell back to eager steps" "! grep -q 'without CUDA graphs' $out/bench_errors2"
exit $failed
