"""Encoding can be killed at any moment and comes out the same; what cannot be read is listed, not lost."""

import dataclasses
import json
import multiprocessing
import random
import time
import wave
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from poet.data.clips import ClipSource, FolderSource, SourceClip
from poet.data.encode import EncodeReport, TokenizerSet, encode_source
from poet.data.shards import open_shards
from poet.errors import CheckpointError, ConfigError, MediaError
from poet.media import Clip
from poet_tokenizers.base import AudioSpec, VideoSpec

FPS, N, H, W, RATE, HOP, K = 8.0, 5, 16, 24, 1600, 40, 3
S = N * 200


@dataclasses.dataclass
class FakeSource:
    """Clip i is a function of i. Names in `broken` cannot be read; every third is silent where `varied`."""

    count: int = 23
    broken: tuple[int, ...] = ()
    varied: bool = False
    sample_rate: int = RATE
    delay: float = 0.0
    name: str = "fake"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SourceClip:
        time.sleep(self.delay)
        if index in self.broken:
            error = MediaError(f"clip {index} is broken")
            error.filename = f"clip-{index}" if index % 2 else None
            raise error
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (N, H, W, 3), dtype=np.uint8)
        samples = rng.uniform(-1, 1, S).astype(np.float32)
        silent, blind = self.varied and index % 3 == 2, self.varied and index % 5 == 4 and index % 3 != 2
        if self.varied and index % 7 == 6:
            frames = frames[:, : H // 2]
        clip = Clip(None if blind else frames, FPS, None if silent else samples, self.sample_rate)
        return SourceClip(f"clip-{index}", clip, None if index % 11 == 10 else f"caption {index}")


class FakeVideo:
    """Codes are the mean gray of a block. Keeps the shapes that it was given."""

    spec = VideoSpec(kind="fake", codebook_size=256, temporal_stride=4, spatial_stride=8)

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, video: Tensor) -> Tensor:
        self.batches.append(tuple(video.shape))
        assert video.dtype == torch.float32
        assert float(video.min()) >= -1
        assert float(video.max()) <= 1
        frames = video[:, :, ::4]
        B, C, T, height, width = frames.shape
        blocks = frames.reshape(B, C, T, height // 8, 8, width // 8, 8).mean((1, 4, 6))
        # The place in the batch enters as well: batches that differ from run to run would be seen in the bytes.
        return ((blocks + 1) * 127.5).long().clamp(0, 240) + torch.arange(B).reshape(B, 1, 1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        raise AssertionError("encoding never decodes")


class FakeAudio:
    """Codes are the loudness of a hop, once a level."""

    spec = AudioSpec(kind="fake", sample_rate=RATE, hop_length=HOP, num_codebooks=K, codebook_size=1024)

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, waveform: Tensor) -> Tensor:
        self.batches.append(tuple(waveform.shape))
        B, _, samples = waveform.shape
        padded = torch.nn.functional.pad(waveform, (0, -samples % HOP)).reshape(B, 1, -1, HOP)
        return (padded.abs().mean(-1) * 1000).long().expand(B, K, -1) + torch.arange(K)[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        raise AssertionError("encoding never decodes")


def tokenizers(video: bool = True, audio: bool = True, fingerprint: str = "f00d") -> TokenizerSet:
    return TokenizerSet(
        fingerprint=fingerprint,
        video_tokenizer=FakeVideo() if video else None,
        audio_tokenizer=FakeAudio() if audio else None,
    )


def encode(directory: Path, source: ClipSource, tools: TokenizerSet | None = None, **options: object) -> EncodeReport:
    chosen = tokenizers() if tools is None else tools
    return encode_source(source, chosen, directory, **({"shard_size": 7, "batch_size": 3} | options))  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_codes_captions_and_sizes_of_every_clip_arrive_in_order(tmp_path: Path) -> None:
    report = encode(tmp_path, FakeSource(varied=True))
    assert (report.num_clips, report.num_resumed, report.num_shards, report.skipped) == (23, 0, 4, ())
    reader = open_shards(tmp_path, "f00d")
    for index, (row, wanted) in enumerate(
        zip(reader, map(FakeSource(varied=True).__getitem__, range(23)), strict=True)
    ):
        assert (row.key, row.text) == (wanted.key, wanted.caption)
        assert (row.video_codes is None) == (wanted.clip.frames is None)
        assert (row.audio_codes is None) == (wanted.clip.samples is None)
        if row.video_codes is not None and wanted.clip.frames is not None:
            height = wanted.clip.frames.shape[1]
            assert row.video_codes.shape == (2, height // 8, 3)
            assert (row.fps, row.resolution) == (FPS, (height, W))
            blocks = wanted.clip.frames[::4].reshape(2, height // 8, 8, 3, 8, 3).mean((2, 4, 5))
            assert np.abs(row.video_codes - blocks).max() < 4, index
        if row.audio_codes is not None and wanted.clip.samples is not None:
            assert row.audio_codes.shape == (K, S // HOP)
            loudness = np.abs(wanted.clip.samples).reshape(-1, HOP).mean(1) * 1000
            assert np.abs(row.audio_codes - np.arange(K)[:, None] - loudness).max() < 1.1


def test_only_clips_of_one_shape_share_a_batch_and_all_of_them_do(tmp_path: Path) -> None:
    tools = tokenizers()
    encode(tmp_path, FakeSource(14), tools, shard_size=7, batch_size=3)
    assert isinstance(tools.video_tokenizer, FakeVideo)
    assert tools.video_tokenizer.batches == [(b, 3, N, H, W) for b in (3, 3, 1, 3, 3, 1)]
    assert isinstance(tools.audio_tokenizer, FakeAudio)
    assert tools.audio_tokenizer.batches == [(b, 1, S) for b in (3, 3, 1, 3, 3, 1)]


@pytest.mark.parametrize(("video", "audio"), [(True, False), (False, True)])
def test_one_tokenizer_alone_leaves_the_other_column_empty(tmp_path: Path, video: bool, audio: bool) -> None:
    encode(tmp_path, FakeSource(5), tokenizers(video, audio))
    for row in open_shards(tmp_path, "f00d"):
        assert (row.video_codes is not None) == video == (row.resolution is not None)
        assert (row.audio_codes is not None) == audio


def test_clips_that_cannot_be_read_are_listed_and_the_others_kept(tmp_path: Path) -> None:
    report = encode(tmp_path, FakeSource(broken=(0, 5, 6, 7, 22)))
    assert report.num_clips == 18
    assert [key for key, _ in report.skipped] == ["fake[0]", "clip-5", "fake[6]", "clip-7", "fake[22]"]
    assert all("is broken" in reason for _, reason in report.skipped)
    listed = json.loads((tmp_path / "manifest.json").read_text())["skipped"]
    assert [(entry["key"], entry["reason"]) for entry in listed] == list(report.skipped)
    assert [row.key for row in open_shards(tmp_path, "f00d")] == [
        f"clip-{i}" for i in range(23) if i not in (0, 5, 6, 7, 22)
    ]


def test_a_source_of_broken_clips_alone_fails_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"of the 5 clips .*clip 0 is broken.*clip 2 .*and 2 more") as caught:
        encode(tmp_path / "new" / "shards", FakeSource(5, broken=(0, 1, 2, 3, 4)), shard_size=2)
    assert "clip 3" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_stays_with_what_is_not_of_the_shards(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MediaError, match="none is"):
        encode(tmp_path, FakeSource(3, broken=(0, 1, 2)))
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_interrupted_run_of_broken_clips_alone_fails_when_it_goes_on(tmp_path: Path) -> None:
    source = FakeSource(10, broken=tuple(range(10)))

    def stop(done: int, of: int) -> None:
        if done > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, source, progress=stop)
    assert (tmp_path / "shard-000000.parquet").exists()
    with pytest.raises(MediaError, match="one of the 10 clips"):
        encode(tmp_path, source)
    assert list(tmp_path.iterdir()) == []


def test_one_readable_clip_late_in_a_source_is_enough(tmp_path: Path) -> None:
    report = encode(tmp_path, FakeSource(10, broken=tuple(range(9))), shard_size=2)
    assert (report.num_clips, len(report.skipped)) == (1, 9)


def test_a_picture_is_cut_to_whole_latent_frames_and_its_sound_with_it(tmp_path: Path) -> None:
    class Longer(FakeSource):
        def __getitem__(self, index: int) -> SourceClip:
            frames = np.zeros((N + 3, H, W, 3), np.uint8)
            return SourceClip("long", Clip(frames, FPS, np.zeros((N + 3) * 200, np.float32), RATE))

    encode(tmp_path, Longer(1))
    row = open_shards(tmp_path, "f00d")[0]
    assert row.video_codes is not None
    assert row.audio_codes is not None
    assert (row.video_codes.shape, row.audio_codes.shape) == ((2, 2, 3), (K, S // HOP))


@pytest.mark.parametrize(("samples", "is_kept"), [(S, True), (S - HOP, True), (S + 999, True), (S - HOP - 1, False)])
def test_sound_much_shorter_than_its_picture_is_not_filled_up(tmp_path: Path, samples: int, is_kept: bool) -> None:
    class Uneven(FakeSource):
        def __getitem__(self, index: int) -> SourceClip:
            return SourceClip("k", Clip(np.zeros((N, H, W, 3), np.uint8), FPS, np.zeros(samples, np.float32), RATE))

    if is_kept:
        encode(tmp_path, Uneven(1))
        assert open_shards(tmp_path, "f00d")[0].audio_codes.shape == (K, S // HOP)  # type: ignore[union-attr]
    else:
        with pytest.raises(MediaError, match="as long as the picture"):
            encode(tmp_path, Uneven(1))


def test_another_sample_rate_is_an_error_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1600"):
        encode(tmp_path, FakeSource(sample_rate=1601))


def test_a_finished_directory_is_left_alone(tmp_path: Path) -> None:
    encode(tmp_path, FakeSource())
    before = contents(tmp_path)
    tools = tokenizers()
    report = encode(tmp_path, FakeSource(), tools)
    assert (report.num_clips, report.num_resumed) == (23, 23)
    assert isinstance(tools.video_tokenizer, FakeVideo)
    assert tools.video_tokenizer.batches == []
    assert contents(tmp_path) == before


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    encode(tmp_path, FakeSource())
    with pytest.raises(CheckpointError, match="beef"):
        encode(tmp_path, FakeSource(), tokenizers(fingerprint="beef"))
    with pytest.raises(ConfigError, match="audio"):
        encode(tmp_path, FakeSource(), tokenizers(audio=False))
    with pytest.raises(ConfigError, match="neither"):
        encode(tmp_path / "new", FakeSource(), tokenizers(False, False))


@pytest.mark.parametrize(("option", "value"), [("shard_size", 0), ("batch_size", 0), ("num_processes", -1)])
def test_numbers_that_cannot_be_used_are_refused(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(ConfigError):
        encode(tmp_path, FakeSource(), None, **{option: value})


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    encode(tmp_path, FakeSource(broken=(3,)), progress=lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (23, 23)
    assert len(seen) > 8


def test_an_interrupted_run_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    source = FakeSource(varied=True, broken=(4, 9, 10))
    encode(tmp_path / "whole", source)

    def stop(done: int, of: int) -> None:
        if done >= 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "halves", source, progress=stop)
    report = encode(tmp_path / "halves", source)
    assert report.num_resumed == 11
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")


def test_killed_at_any_moment_it_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    source = FakeSource(varied=True, broken=(4, 9))
    encode(tmp_path / "whole", source)
    reached = multiprocessing.Value("i", -1)

    def encode_and_tell() -> None:
        def tell(done: int, of: int) -> None:
            reached.value = done
            time.sleep(0.01)  # room for the kill to fall between two clips, or into the writing of a shard

        encode(tmp_path / "killed", source, progress=tell)

    rng = random.Random(0)
    seen = []
    for _ in range(8):
        before = reached.value
        child = fork(encode_and_tell)
        wanted = min(before + rng.randint(1, 9), len(source))
        while reached.value < wanted and child.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02))
        child.kill()
        child.join()
        reader = open_shards(tmp_path / "killed", "f00d", allow_incomplete=True)
        reader.verify()
        seen.append(len(reader))
    encode(tmp_path / "killed", source)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "the runs must have got further between the kills"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def sounds(directory: Path, count: int) -> FolderSource:
    """Files: a worker process has to find the source's class, which it can not in a test module."""
    directory.mkdir()
    for index in range(count):
        samples = np.random.default_rng(index).integers(-999, 999, S, dtype=np.int16)
        with wave.open(str(directory / f"{index:02d}.wav"), "wb") as file:
            file.setparams((1, 2, RATE, S, "NONE", ""))
            file.writeframes(samples.tobytes())
    (directory / "03.wav").write_bytes(b"broken")
    return FolderSource(directory, fps=FPS, height=H, width=W, num_frames=N, sample_rate=RATE)


def test_worker_processes_give_the_same_bytes_as_a_thread(tmp_path: Path) -> None:
    source = sounds(tmp_path / "sounds", 11)
    one = encode(tmp_path / "thread", source)
    other = encode(tmp_path / "processes", source, num_processes=2)
    assert one.skipped == other.skipped
    assert [key for key, _ in other.skipped] == ["03.wav"]
    assert contents(tmp_path / "processes") == contents(tmp_path / "thread")


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    source = sounds(tmp_path / "sounds", 5)

    def encode_slowly() -> None:
        encode(tmp_path / "killed", source, num_processes=2, progress=lambda done, of: time.sleep(60))

    child = fork(encode_slowly)
    deadline = time.monotonic() + 60
    while len(workers := children_of(child.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2
    child.kill()
    child.join()
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers are still there"
        time.sleep(0.05)


def fork(target: Callable[..., object], *args: object) -> ForkProcess:
    """A process that can be killed; forked, as starting anew would take seconds to import torch."""
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    return child


def children_of(pid: int | None) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_reader_that_is_ended_from_outside_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(ThreadPoolExecutor):
        def submit(self, *arguments: object, **options: object) -> Future[object]:  # type: ignore[override]
            dead: Future[object] = Future()
            dead.set_exception(BrokenProcessPool("ended"))
            return dead

    monkeypatch.setattr("poet.data.readahead.ThreadPoolExecutor", Killed)
    with pytest.raises(MediaError, match="Start the same command again"):
        encode_source(FakeSource(), TokenizerSet(fingerprint="f", video_tokenizer=FakeVideo()), tmp_path / "out")
