"""Makes video files of every kind that people have, each frame a different picture of 64 x 48 pixels."""

import struct
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

MS = Fraction(1, 1000)
TICK = 512  # of the mp4 files made here, in 1 / 12,800 s: a frame at 25 a second
TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), "mirror": (-1, 0, 0, 1)}  # to the right


def picture(number):
    """Grey that grows with the frame's number, with noise and a part that flickers."""
    pixels = np.full((48, 64, 3), 2 * number, np.uint8)
    pixels[:, :8] = np.random.default_rng(number).integers(0, 256, (48, 8, 3))
    pixels[:24, 32:] = number % 2 * 255
    return av.VideoFrame.from_ndarray(pixels, format="rgb24")


def encode(path, codec="libx264", frames=60, every=12, stamps=None, format="yuv420p", container=None, **options):
    """Writes frames at 25 a second, or at the stamps (in ms).

    Args:
      path: its suffix chooses the container.
      codec: name of the encoder.
      frames: how many.
      every: a keyframe every so many.
      stamps: ms of each frame.
      format: of the pixels.
      container: options of the container.
      options: of the encoder; `_` in their names stands for `-`.
    """
    options = {name.replace("_", "-"): str(value) for name, value in options.items()}
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, format, every
        if stamps:
            stream.time_base = stream.codec_context.time_base = MS
        for number in range(len(stamps or range(frames))):
            frame = picture(number)
            if stamps:
                frame.pts, frame.time_base = stamps[number], MS
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cut(path, source, first, every=12):
    """Copies the packets from the keyframe before a frame on; an edit list hides those before the frame itself."""
    keyframe = first // every * every * TICK
    with av.open(str(source)) as whole, av.open(str(path), "w") as file:
        video = whole.streams.video[0]
        stream = file.add_stream_from_template(video)
        for packet in whole.demux(video):
            if packet.pts is not None and packet.pts >= keyframe:
                packet.pts, packet.dts, packet.stream = packet.pts - first * TICK, packet.dts - first * TICK, stream
                file.mux(packet)
    return path


def cut_end(path, source, frames):
    """Writes into the edit list that only so many frames are shown."""
    content = bytearray(source.read_bytes())
    (per_second,) = struct.unpack_from(">I", content, content.index(b"mvhd") + 16)
    entry = content.index(b"elst") + 12
    while struct.unpack_from(">i", content, entry + 4)[0] < 0:  # an empty edit, which only delays
        entry += 12
    struct.pack_into(">I", content, entry, frames * per_second // 25)
    path.write_bytes(content)
    return path


def turn(path, source, kind):
    """Writes a display matrix of `TURNS` into the track's header."""
    content, one = bytearray(source.read_bytes()), 0x10000
    a, b, c, d = (value * one for value in TURNS[kind])
    struct.pack_into(">9i", content, content.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(content)
    return path


def skip(path, source, packets):
    """Copies a file without its first packets, as a recording that begins at any moment."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as file:
        video = whole.streams.video[0]
        stream = file.add_stream_from_template(video)
        for number, packet in enumerate(whole.demux(video)):
            if number >= packets and packet.size:
                packet.stream = stream
                file.mux(packet)
    return path


def silence(seconds):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, int(8000 * seconds)), np.int16), layout="mono")
    frame.rate, frame.pts = 8000, 0
    return frame


def sound(path):
    """Writes a file of sound and the picture of its cover."""
    with av.open(str(path), "w") as file:
        stream, cover = file.add_stream("aac", rate=8000), file.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "yuvj420p", Disposition.attached_pic.value
        for packet in cover.encode(picture(1)) + cover.encode() + stream.encode(silence(0.5)) + stream.encode():
            file.mux(packet)
    return path
