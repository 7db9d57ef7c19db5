#!/usr/bin/env bash
# A classification head on one task, the baseline without a prompt. Made to be edited, and settable from outside:
#
#   bash scripts/classify.sh                                                   the embedded model on the embedded data
#   TASK=RTE MODEL=FacebookAI/roberta-base bash scripts/classify.sh --full_finetuning True
#   FROM_LOCAL=True MODEL=model/MR/<run>/best bash scripts/classify.sh --split test
#
# The first run installs what is needed (scripts/setup.sh). Relative paths start where you are.
set -euo pipefail

project="${PROJECT:-nlu}"                      # the project's name on the wandb dashboard
task="${TASK:-}"                               # a task, a table or a YAML file; default: MR, or what --data_path is
from_local="${FROM_LOCAL:-}"                   # True: --train_model_name is a folder with an adapter or a whole model
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # the embedded model, a hub name, or with --from_local True a folder
output_dir="${OUTPUT_DIR:-}"                   # folder of the run; default: a new one below model/
seed="${SEED:-}"                               # seed of the data order, the sampling and the adapter's initial weights

# Every other option of classify.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python classify.py --help` names.
options=(
    # --- run
    # --data_path file.tsv            # a table is the task; with --task, or a folder: rows in place of those in data/
    # --text_columns subject,body     # a table's columns of texts, as subject,body; default: by their names
    # --label_column queue            # a table's column of labels; default: by its name
    # --resume model/run              # folder of the run to continue, from its last checkpoint
    # --split validation              # validation or test: answer it with a trained head; default: train one
    # --config run.yaml               # YAML file with any of these options; the command line overrides it
    # --- model
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
    # --learning_rate 1e-4            # learning rate; default: 0.001, or 5e-05 with --full_finetuning
    # --optimizer adamw_8bit          # adamw_torch, adamw_torch_fused, adamw_8bit, adafactor, sgd, lion_32bit, ...
    # --lr_scheduler cosine           # learning rate over the run: linear, cosine, constant, ...
    # --weight_decay 0.01             # decay of the weights per step, times the learning rate
    # --max_grad_norm 1.0             # norm that gradients are clipped to
    # --gradient_checkpointing True   # True: less memory, as activations are computed twice
    # --start_epoch 0                 # number of the first epoch
    # --end_epoch 1                   # epoch to stop before; default: --start_epoch + 1
    # --max_steps 100                 # number of steps; 0: all epochs; default: 72 without --end_epoch
    # --- answers
    # --max_prompt_length 512         # tokens in a prompt; a longer passage is truncated; default: by the data
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
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/classify.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/classify.py" ${task:+--task "$task"} --train_model_name "$model_path" \
    ${from_local:+--from_local "$from_local"} ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} \
    ${options[@]+"${options[@]}"} "$@"
