#!/usr/bin/env bash
# A small Table 1: MODEL is SmolLM2-135M-Instruct's directory, hh_helpful_{train,test}.jsonl hold pairs of Anthropic HH as
# lines of prompt, chosen, rejected. A second start skips the runs that have finished and resumes those that have saved.
#
#     MODEL=models/smollm2 bash extras/hh.sh
#
# run DIR OPTIONS: one run into DIR, with its output in DIR.log, whose last line is shown if it fails
run() {
    grep -qs "^saved $1 |" $1.log && return
    [ -e $1/state.pt ] && set -- $1 --resume=True
    [ "$2" = --resume=True ] || set -- $* --overwrite=True
    python train.py --out_dir=$* > $1.log 2>&1 || tail -n 1 $1.log
}
export -f run
# each: do the runs that its input names, one a line, two at a time
each() { OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'run $0 $*'; }

: "${MODEL:?the directory of SmolLM2-135M-Instruct}"
mkdir -p out/hh
hh="--data=hh_helpful_train.jsonl --eval_data=hh_helpful_test.jsonl --dtype=bfloat16 --batch_size=16 --max_length=384"
run out/hh/sft --method=sft $hh --init_from=$MODEL --optimizer=adamw --learning_rate=2e-5 --warmup_steps=10 \
    --max_steps=60 --eval_interval=0 --eval_pairs=100
for m in "fdpo --beta=0.03" dpo tdpo1 "tdpo2 --alpha=0.5"; do
    echo out/hh/${m%% *} --method=$m $hh --init_from=out/hh/sft --learning_rate=1e-5 --warmup_steps=10 --max_steps=40 \
        --eval_interval=0
done | each
# accuracy and KLs are in the last line of each log.jsonl; entropy in the last lines that sample.py prints
for m in fdpo dpo tdpo1 tdpo2; do
    [ -s out/hh/$m/samples.jsonl ] ||
        python sample.py --model=out/hh/$m --num_prompts=16 --num_samples=25 --max_new_tokens=64
done
