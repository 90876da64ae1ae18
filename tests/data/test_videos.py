"""Videos: which frames, whether seeking gives the same, and what bad files come to."""

import av
import numpy as np
import pytest

from vocojax.data.videos import VideoError, VideoInfo, choose_frames, probe, read_frames


def write_video(path, frames=150, rate=25, keyframe_every=12):
    """Frame i is grey with brightness i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", keyframe_every
        for i in range(frames):
            pixels = np.full((48, 64, 3), i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


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
    sought, decoded = (read_frames(path, sampling, 3, seek=seek) for seek in (True, False))
    assert np.abs(np.array(brightness(sought)) - expected).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(sought, decoded, strict=True))


def test_bad_videos_are_named(tmp_path):
    good = write_video(tmp_path / "good.mp4").read_bytes()
    files = {"empty": b"", "noise": bytes(range(256)) * 40, "cut": good[: len(good) // 2]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    for name, reason in (("empty", "undecodable video"), ("noise", "undecodable video"), ("cut", "undecodable video"),
                         ("sound.wav", "undecodable video"), ("none", "missing video"), ("", "missing video")):
        with pytest.raises(VideoError, match="video '") as error:
            read_frames(tmp_path / name, "uniform", 4)
        assert error.value.reason == reason, name
    with pytest.raises(VideoError, match="has 150 frames, 151 are needed") as error:
        read_frames(tmp_path / "good.mp4", "uniform", 151)
    assert error.value.reason == "short video"


def test_a_slow_video_is_given_up(tmp_path):
    with pytest.raises(VideoError, match="takes more than") as error:
        read_frames(write_video(tmp_path / "v.mp4"), "uniform", 150, seconds=1e-9)
    assert error.value.reason == "slow video"


def test_damaged_videos_end_in_frames_or_in_a_reason(tmp_path):
    good, random = bytearray(write_video(tmp_path / "good.mp4").read_bytes()), np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(good)
        for place in random.integers(0, len(good), random.integers(1, 60)):
            content[place] = random.integers(256)
        (tmp_path / "bad.mp4").write_bytes(content[: random.integers(len(good) // 2, len(good) + 1)])
        try:
            assert len(read_frames(tmp_path / "bad.mp4", "uniform", 4)) == 4
        except VideoError as error:
            assert error.reason in {"undecodable video", "short video", "slow video", "too many pixels"}
