#!/usr/bin/env bash
# IMDb with a small pretrained model: MODEL is SmolLM2-135M-Instruct's directory, JUDGE that of a classifier with a label
# positive, imdb.parquet has columns text and split. Started again, it skips what has finished and resumes what has saved.
#
#     MODEL=models/smollm2 JUDGE=models/judge bash assets/imdb.sh
#     python eval_imdb.py --runs='out/imdb/[12]-*/' --at_kl 1 2 3 --out=assets/imdb
#
# run DIR OPTIONS: one run into DIR, its output in DIR.log, the last line shown where it fails
run() {
    grep -qs "^saved $1 |" $1.log && return
    [ -e $1/state.pt ] && set -- $1 --resume=True
    [ "$2" = --resume=True ] || set -- $* --overwrite=True
    python train.py --out_dir=$* > $1.log 2>&1 || tail -n 1 $1.log
}
export -f run
# each: the runs that its input names, one a line, two at a time
each() { OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'run $0 $*'; }

: "${MODEL:?the directory of SmolLM2-135M-Instruct}" "${JUDGE:?the directory of a sentiment classifier}"
mkdir -p out/imdb
imdb="--data=imdb --texts=imdb.parquet --dtype=bfloat16 --learning_rate=2e-5 --eval_pairs=64"
pairs="--init_from=out/imdb/sft --reward=$JUDGE --train_prefixes=600 --eval_prefixes=300 --max_new_tokens=40"
pairs="$pairs --min_score_gap=0.3 --warmup_steps=20 --batch_size=16 --max_steps=100 --eval_interval=20 --save_interval=50"
run out/imdb/sft --method=sft $imdb --init_from=$MODEL --optimizer=adamw --warmup_steps=10 --batch_size=24 \
    --max_length=80 --max_steps=110 --eval_interval=55
for s in 1 2; do
    echo out/imdb/$s-dpo --seed=$s --method=dpo $imdb $pairs
done | each
for s in 1 2; do
    for m in tdpo1 "tdpo2 --alpha="{0.5,1}; do
        echo out/imdb/$s-${m/ --/-} --seed=$s --method=$m $imdb $pairs
    done
done | each
