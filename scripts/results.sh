#!/usr/bin/env bash
# The whole table of results, run by run: every task by every method, with the seeds below. Each run is one of the other
# scripts in a folder of its own; what is done is skipped, what was interrupted goes on or starts again, so this can be
# stopped and called again at any time. At the end `report.py` makes the report.
#
#   bash scripts/results.sh                                    everything: about a day on two CPU cores
#   bash scripts/results.sh zero-shot 8-shot SFT               only these methods
#   TASKS="MR SST" SEEDS="0 1 2" bash scripts/results.sh SFT PPO
#   TASKS="MR SST" bash scripts/results.sh SFT-1152 PPO-1152   on 1,152 rows in place of the 576 that all others see
#
# The original files of the tasks lie below data/ (data/README.md); MR needs none.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"
out="${RESULTS:-model/results}"                # one folder per task in it, and in that one per run
tasks="${TASKS:-MR SST CoLA RTE MRPC WiC BoolQ STS-B WNLI COPA WSC AX-b}"
seeds="${SEEDS:-0}"
rows="${EVAL_SIZE:-400}"                       # held-out rows of each task, the same ones for every method
model="${MODEL:-SmolLM2-135M-Instruct}"
methods=("$@")
[ ${#methods[@]} -gt 0 ] || methods=(
    zero-shot zero-shot-free zero-shot-batch 8-shot 8-shot-batch head SFT PPO PPO-sampled PPO-free
)

# BoolQ's training split is not always at hand: without it a part of the validation split is trained on, and only the
# other part is answered, by every method.
boolq=data/SuperGLUE/BoolQ
part="$out/data/BoolQ"
if [ ! -e "$boolq/train.jsonl" ] && [ -e "$boolq/val.jsonl" ] && [ ! -e "$part/val.jsonl" ]; then
    mkdir -p "$part"                           # each process its own files first: several may run beside one another
    head -n -400 "$boolq/val.jsonl" > "$part/.train-$$"
    tail -n 400 "$boolq/val.jsonl" > "$part/.val-$$"
    mv "$part/.train-$$" "$part/train.jsonl"
    mv "$part/.val-$$" "$part/val.jsonl"
fi

failed=0
run() { # folder, script, arguments: unless the folder holds a finished run
    local folder="$1" script="$2"
    shift 2
    if [ -e "$folder/summary.json" ]; then
        echo "done: $folder"
        return
    fi
    local resume=()
    [ ! -e "$folder/arguments.json" ] || resume=(--resume "$folder")
    echo "== bash scripts/$script --output_dir $folder $*"
    if [ ${#resume[@]} -gt 0 ]; then
        bash "scripts/$script" "${resume[@]}" || failed=$((failed + 1))
    else
        bash "scripts/$script" --output_dir "$folder" --report_to none --eval_size "$rows" "$@" || failed=$((failed + 1))
    fi
}

for method in "${methods[@]}"; do
    for task in $tasks; do
        data=()
        [ "$task" != BoolQ ] || [ ! -e "$part/val.jsonl" ] || data=(--data_path "$part")
        for seed in $seeds; do
            folder="$out/${task//\//-}/$method-$seed"
            about=(--task "$task" --train_model_name "$model" --seed "$seed" ${data[@]+"${data[@]}"})
            case "$task $method" in
            "AX-b head"* | "AX-b SFT"* | "AX-b PPO"*) # has no training rows: the model that was trained on RTE answers it
                # Its last weights, as in all figures here: best/ is the untrained model where training did not help.
                trained="$out/RTE/$method-$seed"
                [ -e "$trained/summary.json" ] || continue
                last=$(find "$trained" -maxdepth 1 \( -name "step-*[0-9]" -o -name "epoch-*[0-9]" \) -printf "%T@ %p\n" |
                    sort -n | tail -n 1 | cut -d " " -f 2-)
                if [ -z "$last" ]; then
                    echo "results.sh: $trained holds no checkpoint to answer $task with" >&2
                    failed=$((failed + 1))
                    continue
                fi
                about=(--task "$task" --seed "$seed" --from_local True --train_model_name "$last")
                case "$method" in
                head*) run "$folder" classify.sh "${about[@]}" --split validation ;;
                PPO-free) run "$folder" inference.sh "${about[@]}" --answer_space free ;;
                *) run "$folder" inference.sh "${about[@]}" ;;
                esac
                ;;
            *" zero-shot") run "$folder" inference.sh "${about[@]}" ;;
            *" zero-shot-free") run "$folder" inference.sh "${about[@]}" --answer_space free ;;
            *" zero-shot-contextual" | *" zero-shot-batch")
                run "$folder" inference.sh "${about[@]}" --calibration "${method#zero-shot-}"
                ;;
            *" 8-shot") run "$folder" fewshot.sh "${about[@]}" ;;
            *" 8-shot-contextual" | *" 8-shot-batch")
                run "$folder" fewshot.sh "${about[@]}" --calibration "${method#8-shot-}"
                ;;
            *" head") run "$folder" classify.sh "${about[@]}" ;;
            *" head-"[1-9]*) run "$folder" classify.sh "${about[@]}" --max_steps "$((${method#head-} / 8))" ;;
            *" SFT") run "$folder" sft.sh "${about[@]}" ;;
            *" SFT-"[1-9]*) run "$folder" sft.sh "${about[@]}" --max_steps "$((${method#SFT-} / 8))" ;;
            *" PPO-"[1-9]*) run "$folder" ppo.sh "${about[@]}" --max_steps "$((${method#PPO-} / 8))" ;;
            *" PPO") run "$folder" ppo.sh "${about[@]}" ;;
            *" PPO-sampled") run "$folder" ppo.sh "${about[@]}" --policy_gradient sampled ;;
            *" PPO-free") run "$folder" ppo.sh "${about[@]}" --answer_space free ;;
            *)
                echo "results.sh: error: no method $method; give some of zero-shot zero-shot-free zero-shot-contextual" \
                    "zero-shot-batch 8-shot 8-shot-contextual 8-shot-batch head head-ROWS SFT SFT-ROWS PPO PPO-ROWS PPO-sampled PPO-free" >&2
                exit 2
                ;;
            esac
        done
    done
done
if [ "$failed" -gt 0 ]; then
    echo "results.sh: $failed runs failed; call it again to do them again" >&2
    exit 1
fi
echo "All runs lie in $out. The report: .venv/bin/python report.py --runs $out"
