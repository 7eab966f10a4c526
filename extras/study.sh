#!/usr/bin/env bash
# The runs of assets/RESULTS.md: reward and KL on the embedded task and on IMDb, and a small Table 1 on HH.
# A second start skips the runs that have finished and resumes those that have saved.
#
#     bash extras/study.sh reviews
#     MODEL=models/smollm2 JUDGE=models/judge TEXTS=imdb.parquet bash extras/study.sh imdb
#     MODEL=models/smollm2 bash extras/study.sh hh
#
# MODEL is SmolLM2-135M-Instruct's directory, JUDGE that of a classifier with a label positive, TEXTS a table with
# columns text and split; hh_helpful_{train,test}.jsonl hold pairs of Anthropic HH as lines of prompt, chosen, rejected.
# SEEDS="1 2" runs these seeds only.
set -e
: "${1:?reviews, imdb or hh}"
mkdir -p out/$1

# run DIR OPTIONS: one run into DIR, with its output in DIR.log, whose last line is shown if it fails
run() {
    local dir=$1
    shift
    # a kill may have come between its last save and its last words
    grep -qs "^saved $dir |\|$dir is at step" $dir.log && return
    if [ -e $dir/state.pt ]; then set -- --resume=True; else set -- "$@" --overwrite=True; fi
    python train.py --out_dir=$dir "$@" > $dir.log 2>&1 || tail -n 1 $dir.log
}
export -f run
# each: do the runs that its input names, one a line, two at a time
each() { OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'run $0 "$@"'; }
# methods: DPO with its own knob for the KL, TDPO1, and TDPO2, by --beta and --alpha
methods() {
    for alpha in $2; do echo "tdpo2 --alpha=$alpha"; done
    for beta in $1; do echo "dpo --beta=$beta"; done
    echo tdpo1
}

if [ $1 = reviews ]; then
    steps="--max_steps=120 --warmup_steps=60 --eval_interval=10"
    seeds=${SEEDS:-1 2 3 4 5 6 7 8}
    # first the seeds' SFT models and pairs
    for s in $seeds; do
        echo out/reviews/$s-dpo-beta=0.1 --seed=$s --method=dpo --beta=0.1 $steps
    done | each
    for s in $seeds; do
        methods "0.03 0.3 1 3" "0.25 0.5 1 2 5" | while read m; do
            echo out/reviews/$s-${m/ --/-} --seed=$s --method=$m $steps
        done
    done | each
elif [ $1 = imdb ]; then
    imdb="--data=imdb --texts=${TEXTS:?a table of reviews} --dtype=float32 --learning_rate=2e-5 --eval_pairs=64"
    for s in ${SEEDS:-1 2 3}; do
        run out/imdb/$s-sft --seed=$s --method=sft $imdb \
            --init_from=${MODEL:?the directory of SmolLM2-135M-Instruct} --optimizer=adamw \
            --warmup_steps=10 --batch_size=24 --max_length=80 --max_steps=60 --eval_interval=60
        pairs="--init_from=out/imdb/$s-sft --reward=${JUDGE:?the directory of a sentiment classifier} --seed=$s"
        pairs="$pairs --train_prefixes=400 --eval_prefixes=600 --min_score_gap=0.3 --max_new_tokens=24"
        pairs="$pairs --warmup_steps=20 --batch_size=16 --eval_interval=10 --save_interval=20"
        # the first two runs make the seed's pairs, the same ones; methods that move fast come last and take fewer steps
        methods "1 0.3 0.1" "0.5 1" | while read m; do
            steps=40
            case $m in "dpo --beta=0.1" | tdpo1) steps=30 ;; esac
            echo out/imdb/$s-${m/ --/-} --method=$m $imdb $pairs --max_steps=$steps
        done | each
    done
else
    hh="--data=hh_helpful_train.jsonl --eval_data=hh_helpful_test.jsonl --dtype=bfloat16 --batch_size=16"
    hh="$hh --max_length=384 --warmup_steps=10 --eval_interval=0"
    run out/hh/sft --method=sft $hh --init_from=${MODEL:?the directory of SmolLM2-135M-Instruct} \
        --optimizer=adamw --learning_rate=2e-5 --max_steps=60 --eval_pairs=100
    for m in "fdpo --beta=0.03" dpo tdpo1 "tdpo2 --alpha=0.5"; do
        echo out/hh/${m%% *} --method=$m $hh --init_from=out/hh/sft --learning_rate=1e-5 --max_steps=40
    done | each
    # accuracy and KLs are in the last line of each log.jsonl; entropy in the last lines that sample.py prints
    for m in fdpo dpo tdpo1 tdpo2; do
        [ -s out/hh/$m/samples.jsonl ] ||
            python sample.py --model=out/hh/$m --num_prompts=16 --num_samples=25 --max_new_tokens=64
    done
fi
