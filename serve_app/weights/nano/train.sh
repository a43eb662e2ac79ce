#!/bin/sh
# How these weights were made: from nothing but generated fields, on two CPU cores, in 90 minutes. Ctrl-C, and the same
# command goes on. It ends by time, so that another machine's weights are others; the seed fixes what it sees, in order.
set -e
out=${1:?usage: train.sh OUT}
mkdir -p "$out"
echo 'models: {blank: {source: "seeded:nano:0", licence: Apache-2.0}}' > "$out/cellray.yaml"
python -m jobs.finetune "$out/trained" --full synthetic --model blank --config "$out/cellray.yaml" --minutes 90 --seed 0
(cd "$out/trained" && cellray extract model.safetensors ../nano --float16 --licence Apache-2.0)
