"""Videos: which frames, whether seeking gives the same, and what bad files come to."""

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data import video_files
from tests.data.video_files import cut, cut_end, encode, silence, skip, sound, turn
from vocojax.data import videos
from vocojax.data.frame_choice import VideoInfo, choose_frames
from vocojax.data.images import ImageError
from vocojax.data.videos import VideoError, plan_frames, probe, read_frames, read_plan


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


def brightness(frames):
    return [int(np.asarray(frame).mean().round()) for frame in frames]


@pytest.mark.parametrize(
    ("sampling", "count", "expected"),
    [
        ("uniform", 4, [0, 3, 6, 9]),
        ("segments", 3, [1, 4, 7]),
        ("fps", 9, [0, 2, 4, 6, 8]),
        ("fps", 3, [0, 4, 8]),
        ("uniform", 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("segments", 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_frames_literally(sampling, count, expected):
    assert choose_frames(VideoInfo(10, 2.1), sampling, count) == expected


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.sampled_from(["uniform", "segments", "fps"]), st.integers(0, 9))
def test_a_jittered_frame_is_nearest_to_its_own(frames, count, sampling, seed):
    info = VideoInfo(frames, 3.0)
    chosen = np.array(choose_frames(info, sampling, count))
    drawn = np.array(choose_frames(info, sampling, count, np.random.default_rng(seed)))
    assert len(drawn) == len(chosen) and (drawn >= 0).all() and (drawn < frames).all() and (np.diff(drawn) > 0).all()
    distances = np.abs(drawn[:, None] - chosen)
    assert (distances[np.arange(len(drawn)), np.arange(len(drawn))] == distances.min(1)).all()


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
                         ("sound.wav", "undecodable video"), ("none", "missing video"), ("", "missing video"),
                         ("n" * 300, "missing video"), ("a\0b", "missing video"), ("\ud800", "missing video")):
        with pytest.raises(VideoError, match="video '") as error:
            list(read_frames(tmp_path / name, "uniform", 4))
        assert error.value.reason == reason, name
    assert len(list(read_frames(tmp_path / "good.mp4", "uniform", 151))) == 150
    content = encode(tmp_path / "unknown.mkv").read_bytes()
    (tmp_path / "unknown.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    for path in (sound(tmp_path / "cover.mp4"), tmp_path / "unknown.mkv"):
        with pytest.raises(VideoError, match="has no video stream of a known codec") as error:
            list(read_frames(path, "uniform", 4))
        assert error.value.reason == "undecodable video"


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


def test_the_number_of_packets_is_limited(tmp_path, monkeypatch):
    """Their time stamps are kept in memory."""
    path = write_video(tmp_path / "v.mp4")
    monkeypatch.setattr(videos, "MAX_PACKETS", 149)
    with pytest.raises(VideoError, match="has more than 149 packets") as error:
        probe(path)
    assert error.value.reason == "too many frames"


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
            assert 1 <= len(list(read_frames(tmp_path / "bad.mp4", "uniform", 4))) <= 4
        except VideoError as error:
            assert error.reason in {"undecodable video", "slow video", "too many pixels"}


PAUSES = [*range(0, 1000, 33), 5000, 11000, 11033]
OPEN = {"x264_params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0"}
H265 = {"x265_params": "log-level=none:keyint=12:open-gop=1:bframes=3"}
FILES = {  # name: suffix and how the file is made
    "short groups": (".mp4", lambda path: encode(path, every=5)),
    "one group": (".mp4", lambda path: encode(path, every=250)),
    "no B-frames": (".mov", lambda path: encode(path, bf=0)),
    "open groups": (".mp4", lambda path: encode(path, **OPEN)),
    "gradual refresh": (".mp4", lambda path: encode(path, x264_params="intra-refresh=1:keyint=15")),
    "gradual refresh, stream": (".ts", lambda path: encode(path, x264_params="intra-refresh=1:keyint=15")),
    "interlaced": (".ts", lambda path: encode(path, x264_params="tff=1:interlaced=1")),
    "stream": (".ts", lambda path: encode(path)),
    "stream, no B-frames": (".ts", lambda path: encode(path, bf=0, every=5)),
    "stream, long groups": (".ts", lambda path: encode(path, every=40)),
    "stream, open groups": (".ts", lambda path: encode(path, **OPEN)),
    "stream, MPEG-2": (".ts", lambda path: encode(path, "mpeg2video", bf=2)),
    "stream, begun anywhere": (".ts", lambda path: skip(path, encode(path.with_name("x.ts")), 5)),
    "Matroska": (".mkv", lambda path: encode(path)),
    "Matroska, open groups": (".mkv", lambda path: encode(path, **OPEN)),
    "Matroska, begun anywhere": (".mkv", lambda path: skip(path, encode(path.with_name("x.mkv")), 5)),
    "Matroska, live": (".mkv", lambda path: encode(path, container={"live": "1"})),  # no duration, no index
    "H.265": (".mp4", lambda path: encode(path, "libx265", **H265)),
    "VP8, hidden frames": (".webm", lambda path: encode(path, "libvpx", lag_in_frames=20, auto_alt_ref=1, b="500k")),
    "VP9, hidden frames": (".webm", lambda path: encode(path, "libvpx-vp9", lag_in_frames=20, auto_alt_ref=6,
                                                        deadline="realtime", cpu_used=8)),
    "MPEG-4": (".mp4", lambda path: encode(path, "mpeg4", bf=2)),
    "AVI, MPEG-4, B-frames": (".avi", lambda path: encode(path, "mpeg4", bf=2)),
    "AVI, H.264, B-frames": (".avi", lambda path: encode(path)),
    "AVI, JPEG": (".avi", lambda path: encode(path, "mjpeg", format="yuvj420p")),
    "fragments": (".mp4", lambda path: encode(path, container={"movflags": "frag_keyframe+empty_moov"})),
    "tiny fragments": (".mp4", lambda path: encode(path, container={"movflags": "frag_every_frame+empty_moov"})),
    "pauses": (".mp4", lambda path: encode(path, stamps=PAUSES)),
    "pauses, Matroska": (".mkv", lambda path: encode(path, stamps=PAUSES)),
    "pauses, stream": (".ts", lambda path: encode(path, stamps=PAUSES)),
    "cut at the start": (".mp4", lambda path: cut(path, encode(path.with_name("x.mp4")), 19)),
    "cut at the start, mov": (".mov", lambda path: cut(path, encode(path.with_name("x.mp4"), bf=0), 19)),
    "cut at the end": (".mp4", lambda path: cut_end(path, encode(path.with_name("x.mp4")), 31)),
    "cut at both": (".mp4", lambda path: cut_end(path, cut(path, encode(path.with_name("x.mp4")), 19), 23)),
    "one frame": (".mp4", lambda path: encode(path, frames=1)),
    "one frame, stream": (".ts", lambda path: encode(path, frames=1)),
    "one frame, AVI": (".avi", lambda path: encode(path, "mpeg4", frames=1)),
    "two frames": (".mov", lambda path: encode(path, frames=2)),
    "broken off, Matroska": (".mkv", lambda path: broken_off(path, encode(path))),
}
COUNTS = {"stream, begun anywhere": 48, "Matroska, begun anywhere": 48, "cut at the start": 41,
          "cut at the start, mov": 41, "cut at the end": 31, "cut at both": 23, "one frame": 1, "one frame, stream": 1,
          "one frame, AVI": 1, "two frames": 2, **dict.fromkeys(("pauses", "pauses, Matroska", "pauses, stream"), 34)}


def broken_off(path, source):
    content = source.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize("kind", FILES)
def test_frames_are_those_of_a_full_decode(tmp_path, kind):
    suffix, make = FILES[kind]
    path = make(tmp_path / f"v{suffix}")
    with av.open(str(path)) as container:
        decoded = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    info = probe(path)
    assert info.frames == len(decoded)
    assert len(decoded) == COUNTS.get(kind, 60) or ("broken off" in kind and 20 < len(decoded) < 60)
    for sampling, count in (("uniform", 4), ("uniform", 99), ("segments", 3), ("segments", 10), ("fps", 2), ("fps", 9)):
        expected = np.stack([decoded[index] for index in choose_frames(info, sampling, count)])
        for seek in (True, False):
            frames = np.stack(list(map(np.asarray, read_frames(path, sampling, count, seek=seek))))
            assert np.array_equal(frames, expected), (sampling, count, seek)


@pytest.mark.parametrize(
    ("stamps", "rate"),
    [([0, 40, 80, 120], 25.0), ([0, 2000, 4000], 0.5), ([0, 33, 67, 5000], 0.6), ([0, 1000, 1100, 1200, 9000], 4 / 9)])
def test_the_rate_is_that_of_the_frames(tmp_path, stamps, rate):
    for suffix in ("mp4", "mkv"):
        assert probe(encode(tmp_path / f"v.{suffix}", stamps=stamps)) == (len(stamps), pytest.approx(rate, rel=1e-3))


def test_seeks_save_decoding(tmp_path, monkeypatch):
    """The last frame of 150, with a keyframe every 12: nine, and the eight that are looked at first."""
    monkeypatch.setattr(videos, "MAX_DECODED", 64 * 48 * 20)
    for suffix in ("mp4", "mkv"):
        plan = plan_frames(write_video(tmp_path / f"v.{suffix}"), "uniform", 150)
        last = videos.FramePlan(plan.video, plan.picks[-1:])
        assert brightness(read_plan(last)) == [149]
        with pytest.raises(VideoError, match="takes more than"):
            list(read_plan(last, seek=False))


@pytest.mark.parametrize(
    ("kind", "corners"), [(90, "cadb"), (180, "dcba"), (270, "bdac"), ("mirror", "badc")])
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_frames_are_turned_as_the_file_says(tmp_path, monkeypatch, kind, corners, suffix):
    """A phone's video: the corners a b / c d are of different brightness."""
    greys = dict(zip("abcd", (10, 80, 150, 220), strict=True))
    pixels = np.repeat(np.repeat(np.array([[10, 80], [150, 220]], np.uint8), 24, 0), 32, 1)
    frame = av.VideoFrame.from_ndarray(np.stack([pixels] * 3, -1), format="rgb24")
    monkeypatch.setattr(video_files, "picture", lambda number: frame)
    path = turn(tmp_path / f"v.{suffix}", encode(tmp_path / f"x.{suffix}", frames=2), kind)
    image = np.asarray(next(read_frames(path, "uniform", 1)))
    assert image.shape == ((64, 48, 3) if kind in (90, 270) else (48, 64, 3))
    found = [image[y, x, 0] for y in (5, -5) for x in (5, -5)]
    assert np.abs(np.array(found, int) - [greys[corner] for corner in corners]).max() <= 3


def test_a_frame_that_is_made_up_is_refused(tmp_path):
    """A stream that breaks off in its last frame, which decoders then fill from others."""
    content = encode(tmp_path / "v.ts", bf=0, frames=30).read_bytes()
    (tmp_path / "v.ts").write_bytes(content[: -188 * 3])
    assert len(list(read_frames(tmp_path / "v.ts", "segments", 3))) == 3
    with pytest.raises(VideoError, match=r"v\.ts': is damaged at frame \d+") as error:
        list(read_frames(tmp_path / "v.ts", "uniform", 3))
    assert error.value.reason == "undecodable video"


def test_a_directory_of_frames_is_a_video(tmp_path, monkeypatch):
    for number in range(12):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".frame_0.png").write_bytes(b"")
    assert probe(tmp_path) == (12, 1.0)
    assert brightness(read_frames(tmp_path, "uniform", 12)) == list(range(12))
    assert brightness(read_frames(tmp_path, "fps", 3)) == [0, 6, 11]
    (tmp_path / "frame_11.png").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"frame_11\.png': cannot be decoded"):
        list(read_frames(tmp_path, "uniform", 2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="video '': cannot be read"):
        probe("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="is a directory without images") as error:
        list(read_frames(tmp_path / "empty", "uniform", 2))
    assert error.value.reason == "missing video"
