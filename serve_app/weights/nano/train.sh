#!/bin/sh
# How these weights were made: from nothing but generated fields, on two CPU cores, in runs of 90, 105, 95 and 92 minutes.
# Ctrl-C, and the same command goes on. Runs end by time, so that another machine's weights are others; the seeds fix what
# they see, in order, with the code of that time: from the fourth on crops hold smaller objects, and all three outputs of a
# click are taught. Other work ran beside the second and third; those after the second went on from float16.
set -e
out=${1:?usage: train.sh OUT}
mkdir -p "$out"
cat > "$out/cellray.yaml" <<END
models:
  blank: {source: "seeded:nano:0", licence: Apache-2.0}
  first: {source: "$out/first/model.safetensors", licence: Apache-2.0}
  second: {source: "$out/second/model.safetensors", licence: Apache-2.0}
  third: {source: "$out/third/model.safetensors", licence: Apache-2.0}
END
export CELLRAY_CONFIG="$out/cellray.yaml"
python -m jobs.finetune "$out/first" --full synthetic --model blank --minutes 90 --seed 0
python -m jobs.finetune "$out/second" --full synthetic --model first --minutes 105 --seed 1 --lr 0.0004
python -m jobs.finetune "$out/third" --full synthetic --model second --minutes 95 --seed 2 --lr 0.0004
python -m jobs.finetune "$out/fourth" --full synthetic --model third --minutes 92 --seed 3 --lr 0.0004
(cd "$out/fourth" && cellray extract model.safetensors ../nano --float16 --licence Apache-2.0)
