#!/usr/bin/env bash
# Trains the nano bundle from nothing (make nano). Every step goes on where it was stopped, so the script can be started again.
#   DEVICE=cuda recipes/nano/train.sh     trains on a GPU, with longer runs (see the overrides below)
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
POET=${POET:-poet}
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-cpu}
RUN=runs/nano
CLIPS=48000
VIDEO=() AUDIO=() LANGUAGE=()
if [ "$DEVICE" = cuda ]; then
  CLIPS=200000
  VIDEO=(--set num_steps=30000 --set batch_size=32)
  LANGUAGE=(--set num_steps=12000 --set batch_size=64)
fi

"$POET" train recipes/nano/text_tokenizer.yaml -o $RUN/text_tokenizer
for stage in audio_tokenizer audio_tokenizer_detail audio_tokenizer_hard audio_decoder; do
  "$POET" train recipes/nano/$stage.yaml -o $RUN/$stage --device "$DEVICE" "${AUDIO[@]}"
done
for stage in video_tokenizer video_tokenizer_detail video_tokenizer_hard; do
  "$POET" train recipes/nano/$stage.yaml -o $RUN/$stage --device "$DEVICE" "${VIDEO[@]}"
done
[ -d $RUN/tokenizers/export ] || "$POET" train recipes/nano/tokenizers.yaml -o $RUN/tokenizers
# The words by which a chat changes a prompt; every export takes them along.
"$PYTHON" -c 'import sys; from pathlib import Path; from poet.data.toybox_phrases import write_toybox_phrases as write
write(Path(sys.argv[1]))' $RUN/tokenizers/export/phrases.json
"$POET" encode toybox:train --count $CLIPS --model $RUN/tokenizers/export -o $RUN/shards/train --device "$DEVICE"
"$POET" encode toybox:seen --count 512 --start 100000 --model $RUN/tokenizers/export -o $RUN/shards/seen --device "$DEVICE"
"$POET" encode toybox-films:train --count $((CLIPS / 8)) --model $RUN/tokenizers/export -o $RUN/shards/films --device "$DEVICE"
for stage in language language_more language_parallel language_parallel_more language_distilled language_films \
    language_refined; do
  "$POET" train recipes/nano/$stage.yaml -o $RUN/$stage --device "$DEVICE" "${LANGUAGE[@]}"
done
"$POET" evaluate $RUN/language_refined/export -o $RUN/evaluation
"$POET" evaluate $RUN/language_refined/export --what films --count 40 -o $RUN/films
"$POET" evaluate $RUN/language_refined/export --what reconstruction -o $RUN/reconstruction
echo "The finished bundle is $RUN/language_refined/export, its scores are in $RUN/evaluation, $RUN/films and"
echo "$RUN/reconstruction; recipes/nano/fill_scores.py writes them into the pages."
