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
task="${TASK:-}"                               # SST,RTE, a suite, a table or a YAML file; default: MR, or --data_path's
num_shots="${NUM_SHOTS:-}"                     # demonstrations before each question, from the training split
from_local="${FROM_LOCAL:-}"                   # True: --train_model_name is a folder with an adapter or a whole model
use_CoT="${USE_COT:-}"                         # True: the model writes an analysis before its judgement
model_path="${MODEL:-SmolLM2-135M-Instruct}"   # model name or folder; {task} in it becomes the task whose model answers
output_dir="${OUTPUT_DIR:-}"                   # folder of the run; default: a new one below model/
seed="${SEED:-}"                               # seed of the data order, the sampling and the adapter's initial weights

# Every other option of fewshot.py. The values only show the form: what is commented out has the default that
# `.venv/bin/python fewshot.py --help` names.
options=(
    # --- run
    # --data_path file.tsv            # a table is the task; with --task, or a folder: rows in place of those in data/
    # --text_columns subject,body     # a table's columns of texts, as subject,body; default: by their names
    # --label_column queue            # a table's column of labels; default: by its name
    # --resume model/run              # folder of an interrupted run to finish
    # --config run.yaml               # YAML file with any of these options; the command line overrides it
    # --- model
    # --load_in_8bit False            # True: the base model's linear layers with 8-bit weights
    # --load_in_4bit False            # True: with 4-bit weights (NF4, as QLoRA)
    # --dtype bfloat16                # float32, bfloat16 or float16; default: bfloat16 on a card, else float32
    # --trust_remote_code False       # True: run the Python code that comes with the model
    # --tokens_per_micro_batch 512    # tokens per forward pass; default: by free memory
    # --- endpoint
    # --endpoint http://localhost:8000/v1 # base URL of an OpenAI-compatible server that answers, as a rule .../v1
    # --concurrency 8                 # requests to the server at a time
    # --price_in 2.5                  # price of a million prompt tokens, for the cost in summaries and reports
    # --price_out 10.0                # price of a million tokens of answers
    # --- prompting
    # --batch_sentence_num 256        # rows answered and saved at a time
    # --eval_size 500                 # rows per task; 0: all; default: 400, or all where they are unlabelled
    # --split validation              # validation, test, or all: every row of a file (default of --data_path FILE)
    # --submission True               # True: answer all of test and write the suite's leaderboard zip
    # --same_shots True               # True: the same demonstrations for all rows; False: drawn for each
    # --- answers
    # --model_temperature 1.0         # sampling temperature
    # --max_prompt_length 1536        # tokens in a prompt with its demonstrations; a long passage is truncated
    # --max_response_length 8         # tokens in an answer; 0: 16, or 96 with --use_CoT True
    # --answer_space labels           # labels (default): only the task's labels; free: any token; score: likeliest one
    # --number_answer likeliest       # STS-B, among labels: mean of the numbers (default), or likeliest
    # --calibration batch             # none, contextual, batch or (with score) pmi: see docs/prompting.md
    # --do_sample True                # True: sample at --model_temperature; False: greedy
    # --strict_format False           # True: only the closing tag ends a free answer
    # --- evaluation and saving
    # --report_to none                # dashboard: none, wandb, tensorboard or trackio
)

# ---------------------------------------------------------------------------------------------- nothing to edit below
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
export WANDB_PROJECT="$project"
# A run that goes on keeps its own settings; only what is typed may change them.
case " $* " in *" --resume"*) exec "$root/.venv/bin/python" "$root/fewshot.py" "$@" ;; esac
exec "$root/.venv/bin/python" "$root/fewshot.py" ${task:+--task "$task"} --train_model_name "$model_path" \
    ${num_shots:+--num_shots "$num_shots"} ${from_local:+--from_local "$from_local"} ${use_CoT:+--use_CoT "$use_CoT"} \
    ${output_dir:+--output_dir "$output_dir"} ${seed:+--seed "$seed"} ${options[@]+"${options[@]}"} "$@"
