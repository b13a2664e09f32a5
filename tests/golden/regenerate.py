"""Write the golden files anew: `python tests/golden/regenerate.py [NAME ...]` (every file unless some are named).

A golden file holds what must not change by accident: ids that are stored in shards, numbers that weights depend on,
words that users read. Look at the difference in git before committing it: a changed file means that shards and models
made before can no longer be read.

A new golden file is one more entry in GOLDEN: its name and a function that returns its text. Its test compares
`GOLDEN[name]()` with the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from poet.sequence import Scene, grammar_to_json, output_grammar, pack
from poet.tasks import TASKS
from poet.testing import tiny_geometry, tiny_vocabulary

HERE = Path(__file__).parent


def vocabulary_layout() -> str:
    """The tiny vocabulary's names, ranges and fingerprint."""
    vocabulary = tiny_vocabulary()
    levels = range(vocabulary.num_audio_codebooks)
    layout = {
        "fingerprint": vocabulary.fingerprint,
        "vocab_size": vocabulary.vocab_size,
        "padded_vocab_size": vocabulary.padded_vocab_size,
        "video_range": vocabulary.video_range,
        "audio_ranges": [vocabulary.audio_range(level) for level in levels],
        "text_range": vocabulary.text_range,
        "specials": vocabulary.specials,
    }
    return json.dumps(layout, indent=2) + "\n"


def packed_scenes() -> str:
    """One packed scene and its output's grammar for every task; codes are counted out, not drawn."""
    vocabulary = tiny_vocabulary()
    geometry = tiny_geometry(vocabulary, num_latent_frames=2)
    video = np.arange(2 * 3 * 5).reshape(2, 3, 5) * 7 % 31
    audio = np.arange(3 * geometry.num_audio_latents(geometry.num_frames)).reshape(3, -1) * 5 % 13
    lines = []
    for name, task in TASKS.items():
        edited = (video + 1) % 31 if task.edit else None
        parts = task.split_clip(video, audio, geometry, task.default_condition(2), edited)
        scene = Scene.from_parts(name, parts, text=[2, 41, 0], resolution=geometry.resolution)
        packed = pack(scene, vocabulary)
        shape = task.output_shape(geometry)
        grammar = output_grammar(
            task, vocabulary, video_latent_shape=shape.video, num_audio_latents=shape.audio, max_text_pieces=11
        )
        entry = {
            "prefix_len": packed.prefix_len,
            "ids": packed.ids.tolist(),
            "grammar": grammar_to_json(grammar),
        }
        lines.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


GOLDEN: dict[str, Callable[[], str]] = {
    "vocabulary_layout.json": vocabulary_layout,
    "packed_scenes.json": packed_scenes,
}


def main(names: list[str]) -> None:
    unknown = sorted(set(names) - set(GOLDEN))
    if unknown:
        raise SystemExit(f"there are no golden files {unknown}; there are {sorted(GOLDEN)}")
    for name in names or GOLDEN:
        (HERE / name).write_text(GOLDEN[name](), encoding="utf-8")
        print(HERE / name)


if __name__ == "__main__":
    main(sys.argv[1:])
