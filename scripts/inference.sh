#!/usr/bin/env bash
# Answers a task's questions: zero-shot, or with an adapter trained before. Made to be edited, and settable from
# outside:
#
#   bash scripts/inference.sh                                                  the embedded model on the embedded data
#   TASK=RTE MODEL=Qwen/Qwen2.5-1.5B-Instruct bash scripts/inference.sh
#   FROM_LOCAL=True MODEL=model/sst/best TASK=SST bash scripts/inference.sh    a trained adapter
#   FROM_LOCAL=True MODEL='model/{task}/best' TASK=GLUE bash scripts/inference.sh --submission True
#                                                                              each task's own, and the leaderboard zip
#
# The first run installs what is needed (scripts/setup.sh). Relative paths start where you are.
set -euo pipefail

project="${PROJECT:-nlu}"                      # the project's name on the wandb dashboard
task="${TASK:-MR}"                             # one of tasks/table.py, several as SST,RTE, or a suite: GLUE, SuperGLUE
from_local="${FROM_LOCAL:-}"                   # True: model_path is a folder, as with the best/ of a finished run
use_CoT="${USE_COT:-}"                         # True: the model writes an analysis before its judgement
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # the embedded one, a name on the hub, or (from_local) a folder
output_dir="${OUTPUT_DIR:-}"                   # where results go; empty: a new folder below model/
seed="${SEED:-}"                               # of whatever is sampled

# Every other option of inference.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python inference.py --help` names.
options=(
    # --split validation              # validation, or test: also writes the leaderboard file
    # --submission True               # TASK=GLUE or SuperGLUE: answers all of test and writes the suite's zip
    # --eval_size 500                 # so many rows of each task; 0: all
    # --batch_sentence_num 256        # rows answered, and saved, at once
    # --data_path file.tsv            # answer this file or folder, in the task's own format
    # --load_in_8bit False            # True: the base model's weights in 8 bits (CUDA and bitsandbytes)
    # --trust_remote_code False       # True: Python files that come with the model may be run
    # --tokens_per_micro_batch 512    # tokens that go through the network at once; default: by free memory
    # --answer_space labels           # labels: only the task's labels; free: any token; score: the likeliest label
    # --do_sample True                # sample instead of taking the likeliest token
    # --model_temperature 1.0         # of sampling
    # --strict_format False           # True: only the closing tag ends a free answer
    # --max_prompt_length 512         # tokens; a longer passage is cut
    # --max_response_length 8         # tokens of a free answer
    # --resume model/run              # finish this run, which was interrupted
    # --report_to none                # none, wandb, tensorboard or trackio
    # --config run.yaml               # options from a YAML file; what is set above or typed wins over it
)

# ---------------------------------------------------------------------------------------------- nothing to edit below
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
export WANDB_PROJECT="$project"
# A run that goes on keeps its own settings; only what is typed may change them.
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/inference.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/inference.py" --task "$task" --train_model_name "$model_path" \
    ${from_local:+--from_local "$from_local"} ${use_CoT:+--use_CoT "$use_CoT"} \
    ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} ${options[@]+"${options[@]}"} "$@"
