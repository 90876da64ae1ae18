"""Videos: which frames, whether seeking gives the same, and what bad files come to."""

import av
import numpy as np
import pytest

from vocojax.data import videos
from vocojax.data.videos import VideoError, VideoInfo, choose_frames, probe, read_frames


def write_video(path, frames=150, rate=25, keyframe_every=12, sound=0.0):
    """Frame i is grey with brightness i; so many seconds of silence beside it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", keyframe_every
        audio = container.add_stream("mp2" if str(path).endswith(".ts") else "pcm_s16le", rate=8000) if sound else None
        for i in range(frames):
            pixels = np.full((48, 64, 3), i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if sound:
            container.mux(audio.encode(silence(sound)) + audio.encode())
    return path


def silence(seconds):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * seconds)), np.int16), layout="mono")
    frame.rate, frame.pts = 8000, 0
    return frame


def brightness(frames):
    return [int(np.asarray(frame).mean().round()) for frame in frames]


@pytest.mark.parametrize(
    ("sampling", "count", "expected"),
    [
        ("uniform", 4, [0, 3, 6, 9]),
        ("segments", 3, [1, 4, 7]),
        ("fps", 9, [0, 2, 4, 6, 8]),
        ("fps", 3, [0, 4, 8]),
    ],
)
def test_frames_literally(sampling, count, expected):
    assert choose_frames(VideoInfo(10, 2.1), sampling, count) == expected


def test_segments_are_video_chatgpt_s_hundred_frames():
    """Its rule, for 1,000 frames: middles of segments whose edges are at multiples of 9.99, rounded."""
    chosen = choose_frames(VideoInfo(1000, 25.0), "segments", 100)
    assert chosen[:4] == [5, 15, 25, 35] and chosen[-2:] == [984, 994] and len(chosen) == 100


@pytest.mark.parametrize("sampling", ["uniform", "segments", "fps"])
@pytest.mark.parametrize("keyframe_every", [5, 1000])
def test_the_right_frames_are_read_with_and_without_seeks(tmp_path, sampling, keyframe_every):
    path = write_video(tmp_path / "v.mp4", keyframe_every=keyframe_every)
    assert probe(path) == (150, 25.0)
    expected = choose_frames(VideoInfo(150, 25.0), sampling, 3)
    sought, decoded = (list(read_frames(path, sampling, 3, seek=seek)) for seek in (True, False))
    assert np.abs(np.array(brightness(sought)) - expected).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(sought, decoded, strict=True))


def test_bad_videos_are_named(tmp_path):
    good = write_video(tmp_path / "good.mp4").read_bytes()
    files = {"empty": b"", "noise": bytes(range(256)) * 40, "cut": good[: len(good) // 2]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        container.mux(stream.encode(silence(0.1)))
    for name, reason in (("empty", "undecodable video"), ("noise", "undecodable video"), ("cut", "undecodable video"),
                         ("sound.wav", "undecodable video"), ("none", "missing video"), ("", "missing video")):
        with pytest.raises(VideoError, match="video '") as error:
            list(read_frames(tmp_path / name, "uniform", 4))
        assert error.value.reason == reason, name
    with pytest.raises(VideoError, match="has 150 frames, 151 are needed") as error:
        list(read_frames(tmp_path / "good.mp4", "uniform", 151))
    assert error.value.reason == "short video"


def test_a_slow_video_is_given_up(tmp_path):
    with pytest.raises(VideoError, match="takes more than") as error:
        list(read_frames(write_video(tmp_path / "v.mp4"), "uniform", 150, seconds=1e-9))
    assert error.value.reason == "slow video"


@pytest.mark.parametrize("suffix", ["mkv", "ts", "mov"])
@pytest.mark.parametrize("rate", [25, 30])
def test_frames_are_counted_whatever_the_container_says(tmp_path, suffix, rate):
    """Matroska has no count of frames and the duration of its longest stream, here the sound."""
    path = write_video(tmp_path / f"v.{suffix}", frames=100, rate=rate, sound=6.0 if suffix == "mkv" else 0.0)
    assert probe(path) == (100, rate)
    frames = list(read_frames(path, "uniform", 4))
    assert np.abs(np.array(brightness(frames)) - [0, 33, 66, 99]).max() <= 1


def test_files_that_lead_to_other_files_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    write_video(tmp_path / "secret.ts")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n../secret.ts\n#EXT-X-ENDLIST\n"
    concatenation = f"ffconcat version 1.0\nfile '{tmp_path}/secret.ts'\n"
    for name, text in (("x.m3u8", playlist), ("x.ffconcat", concatenation), ("x.mp4", concatenation)):
        (tmp_path / "root" / name).write_text(text)
        with pytest.raises(VideoError, match="is not mp4, mov, mkv, webm, avi or ts") as error:
            list(read_frames(tmp_path / "root" / name, "uniform", 4))
        assert error.value.reason == "undecodable video"


def test_work_is_limited_before_time(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "MAX_DECODED", 64 * 48 * 20)
    path = write_video(tmp_path / "v.mp4", keyframe_every=1000)
    assert len(list(read_frames(path, "fps", 1))) == 1
    with pytest.raises(VideoError, match="takes more than 61440 decoded pixels") as error:
        list(read_frames(path, "uniform", 4))
    assert error.value.reason == "too many pixels"


def test_frames_come_one_by_one(tmp_path):
    frames = read_frames(write_video(tmp_path / "v.mp4"), "uniform", 4)
    assert brightness([next(frames)]) == [0] and not isinstance(frames, list)


def test_damaged_videos_end_in_frames_or_in_a_reason(tmp_path):
    good, random = bytearray(write_video(tmp_path / "good.mp4").read_bytes()), np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 60)):
            content[place] = random.integers(256)
        (tmp_path / "bad.mp4").write_bytes(content[: random.integers(len(good) // 2, len(good) + 1)])
        try:
            assert len(list(read_frames(tmp_path / "bad.mp4", "uniform", 4))) == 4
        except VideoError as error:
            assert error.reason in {"undecodable video", "short video", "slow video", "too many pixels"}
