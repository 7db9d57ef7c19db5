#!/usr/bin/env bash
# Few-shot prompting: the model sees solved examples of the task and is not trained. Made to be edited, and settable
# from outside:
#
#   bash scripts/fewshot.sh                                                    the embedded model on the embedded data
#   TASK=RTE MODEL=Qwen/Qwen2.5-1.5B-Instruct NUM_SHOTS=5 bash scripts/fewshot.sh
#
# The first run installs what is needed (scripts/setup.sh). Relative paths start where you are.
set -euo pipefail

project="${PROJECT:-nlu}"                      # the project's name on the wandb dashboard
task="${TASK:-MR}"                             # one of tasks/table.py, several as SST,RTE, or a suite: GLUE, SuperGLUE
num_shots="${NUM_SHOTS:-}"                     # worked examples from the training split in front of each question
from_local="${FROM_LOCAL:-}"                   # True: model_path is a folder, an adapter or a model trained before
use_CoT="${USE_COT:-}"                         # True: the model writes an analysis before its judgement
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # the embedded one, a name on the hub, or (from_local) a folder
output_dir="${OUTPUT_DIR:-}"                   # where results go; empty: a new folder below model/
seed="${SEED:-}"                               # which examples are shown

# Every other option of fewshot.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python fewshot.py --help` names.
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
    # --same_shots True               # False: other demonstrations for each row
    # --do_sample True                # sample instead of taking the likeliest token
    # --model_temperature 1.0         # of sampling
    # --strict_format False           # True: only the closing tag ends a free answer
    # --max_prompt_length 1536        # tokens, demonstrations included; a longer passage is cut
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
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/fewshot.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/fewshot.py" --task "$task" --train_model_name "$model_path" \
    ${num_shots:+--num_shots "$num_shots"} ${from_local:+--from_local "$from_local"} ${use_CoT:+--use_CoT "$use_CoT"} \
    ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} ${options[@]+"${options[@]}"} "$@"
