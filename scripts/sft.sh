#!/usr/bin/env bash
# Supervised fine-tuning on one task, or on all tasks of a suite. Made to be edited, and settable from outside:
#
#   bash scripts/sft.sh                                                        the embedded model on the embedded data
#   TASK=RTE MODEL=Qwen/Qwen2.5-1.5B-Instruct bash scripts/sft.sh
#   DATAFOLDER_PATH=data/GLUE LINES_PER_FILE=30000 bash scripts/sft.sh --end_epoch 1
#
# The first run installs what is needed (scripts/setup.sh). Relative paths start where you are.
set -euo pipefail

project="${PROJECT:-nlu}"                      # the project's name on the wandb dashboard
task="${TASK:-MR}"                             # one of tasks/table.py, several as SST,RTE, or a suite: GLUE, SuperGLUE
datafolder_path="${DATAFOLDER_PATH:-}"         # a suite's folder, such as data/GLUE: all of its tasks, instead of task
lines_per_file="${LINES_PER_FILE:-}"           # at most so many rows of each task, so that none drowns the others
from_local="${FROM_LOCAL:-}"                   # True: model_path is a folder, an adapter or a model trained before
use_CoT="${USE_COT:-}"                         # as in the other scripts; but there are no analyses to learn from
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # the embedded one, a name on the hub, or (from_local) a folder
output_dir="${OUTPUT_DIR:-}"                   # where checkpoints and results go; empty: a new folder below model/
seed="${SEED:-}"                               # of the data's order, the sampling and the adapter's start

# Every other option of sft.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python sft.py --help` names.
options=(
    # --- the run
    # --start_epoch 0                 # number of the first epoch
    # --end_epoch 1                   # train up to, not including, this epoch: whole epochs
    # --max_steps 100                 # stop after so many steps; 0: when the epochs end
    # --batch_sentence_num 8          # rows per step
    # --repeat_time 1                 # how often each row is seen in an epoch
    # --learning_rate 5e-4            # step size of the adapter
    # --data_path file.tsv            # train on this file or folder, in the task's own format
    # --load_in_8bit False            # True: the base model's weights in 8 bits (CUDA and bitsandbytes)
    # --trust_remote_code False       # True: Python files that come with the model may be run
    # --tokens_per_micro_batch 512    # tokens that go through the network at once; default: by free memory
    # --config run.yaml               # options from a YAML file; what is set above or typed wins over it
    # --- what is asked and what may be answered
    # --answer_space labels           # labels: only the task's labels; free: any token; score: the likeliest label
    # --loss_on answer                # answer, or full: prompt and answer, as published
    # --do_sample True                # evaluation samples instead of taking the likeliest token
    # --model_temperature 1.0         # of sampling
    # --max_prompt_length 512         # tokens; a longer passage is cut
    # --max_response_length 8         # tokens
    # --- evaluating, saving, reporting
    # --eval_steps 20                 # evaluate every so many steps
    # --eval_size 500                 # on so many rows of the validation split
    # --save_methods epoch            # save by step or by epoch
    # --save_freq 150                 # with step: save every so many steps
    # --checkpoint_rate 1             # with epoch: save every so many epochs
    # --save_total_limit 3            # keep the last three checkpoints and the best; 0: all
    # --resume model/run              # go on from this run's last checkpoint
    # --report_to none                # none, wandb, tensorboard or trackio
)

# ---------------------------------------------------------------------------------------------- nothing to edit below
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
export WANDB_PROJECT="$project"
# A run that goes on keeps its own settings; only what is typed may change them.
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/sft.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/sft.py" --task "$task" --train_model_name "$model_path" \
    ${datafolder_path:+--datafolder_path "$datafolder_path"} ${lines_per_file:+--lines_per_file "$lines_per_file"} \
    ${from_local:+--from_local "$from_local"} ${use_CoT:+--use_CoT "$use_CoT"} \
    ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} ${options[@]+"${options[@]}"} "$@"
