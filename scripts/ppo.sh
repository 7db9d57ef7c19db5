#!/usr/bin/env bash
# PPO on one task. Made to be edited, and settable from outside for a single run:
#
#   bash scripts/ppo.sh                                                        the embedded model on the embedded data
#   TASK=RTE MODEL=Qwen/Qwen2.5-1.5B-Instruct bash scripts/ppo.sh
#   TASK=SST OUTPUT_DIR=model/sst SEED=1 bash scripts/ppo.sh --end_epoch 3     arguments win over everything here
#
# The first run installs what is needed (scripts/setup.sh). Relative paths start where you are.
set -euo pipefail

project="${PROJECT:-nlu}"                      # the project's name on the wandb dashboard
task="${TASK:-MR}"                             # MR, MRPC, CoLA, SST, RTE, ..., SuperGLUE/RTE; tasks/table.py lists them all
from_local="${FROM_LOCAL:-}"                   # True: model_path is a folder, an adapter or a model trained before
use_CoT="${USE_COT:-}"                         # True: the model writes an analysis before its judgement
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # the embedded one, a name on the hub, or (from_local) a folder
output_dir="${OUTPUT_DIR:-}"                   # where checkpoints and results go; empty: a new folder below model/
seed="${SEED:-}"                               # of the data's order, the sampling and the adapter's start

# Every other option of ppo.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python ppo.py --help` names.
options=(
    # --- the run
    # --start_epoch 0                 # number of the first epoch
    # --end_epoch 1                   # train up to, not including, this epoch: whole epochs
    # --max_steps 100                 # stop after so many steps, whatever the epochs say
    # --batch_sentence_num 32         # prompts per step
    # --repeat_time 16                # answers sampled per prompt
    # --data_path file.tsv            # train on this file or folder, in the task's own format
    # --load_in_8bit False            # True: the base model's weights in 8 bits (CUDA and bitsandbytes)
    # --trust_remote_code False       # True: Python files that come with the model may be run
    # --tokens_per_micro_batch 512    # tokens that go through the network at once; default: by free memory
    # --config run.yaml               # options from a YAML file; what is set above or typed wins over it
    # --- PPO
    # --learning_rate 1e-4            # step size of the adapter
    # --warmup_steps 3                # steps until the learning rate is full
    # --value_learning_rate 1e-3      # step size of the value head
    # --ppo_epochs 4                  # passes over each rollout
    # --num_minibatches 1             # updates per pass
    # --clip_range 0.2                # how far the policy's probability ratio may leave 1
    # --kl_coef 0.05                  # price of leaving the reference model
    # --entropy_coef 0.01             # bonus for a policy that stays undecided
    # --value_coef 0.5                # weight of the value head's loss
    # --policy_gradient sampled       # sampled, or expected: sum over all labels where each one's reward is known
    # --reward_correct 1.0            # reward of a correct answer
    # --reward_wrong -1.0             # of a wrong one
    # --reward_invalid -3.0           # of one that does not parse
    # --reward_number 2.5             # STS-B: of an exact number; less the distance of another
    # --strict_format False           # True: only the closing tag ends a free answer
    # --- what is asked and what may be answered
    # --answer_space labels           # labels: only the task's labels can be answered; free: any token
    # --model_temperature 1.0         # of sampling while training; evaluation is greedy
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
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/ppo.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/ppo.py" --task "$task" --train_model_name "$model_path" \
    ${from_local:+--from_local "$from_local"} ${use_CoT:+--use_CoT "$use_CoT"} \
    ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} ${options[@]+"${options[@]}"} "$@"
