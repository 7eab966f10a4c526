#!/usr/bin/env bash
# The embedded task: eight objectives, five seeds. Started again, it skips what has finished and resumes what has saved.
#
#     bash assets/embedded.sh && python eval_imdb.py --runs='out/sweep/[1-5]-*/' --at_kl 0.3 1 2 --out=assets/reviews
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

mkdir -p out/sweep
steps="--max_steps=120 --warmup_steps=60 --eval_interval=20"
# first DPO, which makes the seeds' SFT models and pairs
for s in 1 2 3 4 5; do
    echo out/sweep/$s-dpo --seed=$s --method=dpo $steps
done | each
for s in 1 2 3 4 5; do
    for m in fdpo tdpo1 "tdpo2 --alpha="{0.5,1,1.5,2,5}; do
        echo out/sweep/$s-${m/ --/-} --seed=$s --method=$m $steps
    done
done | each
