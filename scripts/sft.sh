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
task="${TASK:-}"                               # SST,RTE, a suite, a table or a YAML file; default: MR, or --data_path's
datafolder_path="${DATAFOLDER_PATH:-}"         # folder such as data/GLUE: train on every task in it, not on --task
lines_per_file="${LINES_PER_FILE:-}"           # training rows of each task, at most
from_local="${FROM_LOCAL:-}"                   # True: --train_model_name is a folder with an adapter or a whole model
use_CoT="${USE_COT:-}"                         # True: the model writes an analysis before its judgement
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # the embedded model, a hub name, or with --from_local True a folder
output_dir="${OUTPUT_DIR:-}"                   # folder of the run; default: a new one below model/
seed="${SEED:-}"                               # seed of the data order, the sampling and the adapter's initial weights

# Every other option of sft.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python sft.py --help` names.
options=(
    # --- run
    # --data_path file.tsv            # a table is the task; with --task, or a folder: rows in place of those in data/
    # --text_columns subject,body     # a table's columns of texts, as subject,body; default: by their names
    # --label_column queue            # a table's column of labels; default: by its name
    # --resume model/run              # folder of the run to continue, from its last checkpoint
    # --config run.yaml               # YAML file with any of these options; the command line overrides it
    # --- model
    # --load_in_8bit False            # True: the base model's linear layers with 8-bit weights
    # --load_in_4bit False            # True: with 4-bit weights (NF4, as QLoRA)
    # --dtype bfloat16                # float32, bfloat16 or float16; default: bfloat16 on a card, else float32
    # --trust_remote_code False       # True: run the Python code that comes with the model
    # --tokens_per_micro_batch 512    # tokens per forward pass; default: by free memory
    # --- adapter
    # --lora_r 8                      # rank
    # --lora_alpha 16                 # scaling: the update is times alpha / r
    # --lora_dropout 0.05             # share of a layer's input that the adapter does not see; 0 in PPO
    # --lora_targets q_proj,v_proj    # all-linear, or names of linear layers such as q_proj,v_proj
    # --use_rslora True               # True: scaling alpha / sqrt(r) in place of alpha / r
    # --full_finetuning True          # True: train all weights, without an adapter
    # --- training
    # --batch_sentence_num 8          # rows per step
    # --learning_rate 5e-4            # learning rate; default: 0.0005, or 5e-05 with --full_finetuning
    # --optimizer adamw_8bit          # adamw_torch, adamw_torch_fused, adamw_8bit, adafactor, sgd, lion_32bit, ...
    # --lr_scheduler cosine           # learning rate over the run: linear, cosine, constant, ...
    # --weight_decay 0.01             # decay of the weights per step, times the learning rate
    # --max_grad_norm 1.0             # norm that gradients are clipped to
    # --gradient_checkpointing True   # True: less memory, more time; default: on a card with --loss_on full
    # --start_epoch 0                 # number of the first epoch
    # --end_epoch 1                   # epoch to stop before; default: --start_epoch + 1
    # --max_steps 100                 # number of steps; 0: all epochs; default: 72 for one task without --end_epoch
    # --balance_tasks True            # True: every task equally often, small ones repeated; SFT: up to --lines_per_file
    # --repeat_time 1                 # how often each row is seen in an epoch
    # --- SFT
    # --loss_on answer                # label: choice of the label; answer: the answer's tokens; full: prompt too
    # --label_smoothing 0.1           # --loss_on label: share of the target that all labels get alike
    # --packing True                  # --loss_on full: rows packed by TRL; --batch_sentence_num counts packed ones
    # --number_target nearest         # --loss_on label, STS-B: nearest number, or soft: close ones too
    # --- answers
    # --model_temperature 1.0         # sampling temperature
    # --max_prompt_length 512         # tokens in a prompt; a longer passage is truncated; default: by the data
    # --max_response_length 8         # tokens in an answer; 0: 16, or 96 with --use_CoT True
    # --answer_space labels           # labels (default): only the task's labels; free: any token; score: likeliest one
    # --number_answer likeliest       # STS-B, among labels: mean of the numbers (default), or likeliest
    # --do_sample True                # True: evaluation samples at --model_temperature; False: greedy
    # --- evaluation and saving
    # --eval_size 500                 # held-out rows to evaluate on; 0: all
    # --report_to none                # dashboard: none, wandb, tensorboard or trackio
    # --save_methods epoch            # when to save checkpoints: step or epoch
    # --save_freq 150                 # steps between checkpoints, with --save_methods step
    # --checkpoint_rate 1             # epochs between checkpoints, with --save_methods epoch
    # --eval_steps 20                 # steps between evaluations; 0: only before and after training
    # --save_total_limit 3            # checkpoints to keep beside the best; 0: all
)

# ---------------------------------------------------------------------------------------------- nothing to edit below
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
export WANDB_PROJECT="$project"
# A run that goes on keeps its own settings; only what is typed may change them.
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/sft.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/sft.py" ${task:+--task "$task"} --train_model_name "$model_path" \
    ${datafolder_path:+--datafolder_path "$datafolder_path"} ${lines_per_file:+--lines_per_file "$lines_per_file"} \
    ${from_local:+--from_local "$from_local"} ${use_CoT:+--use_CoT "$use_CoT"} \
    ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} ${options[@]+"${options[@]}"} "$@"
