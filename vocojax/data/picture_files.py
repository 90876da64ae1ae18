"""The bytes of PNG and JPEG files, as far as they decide whether Pillow can be asked to decode them."""

import re
import struct

import numpy as np

PNG = b"\x89PNG\r\n\x1a\n"
NOTES = (b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf")  # profile, texts, EXIF: no pixel depends on them
JPEG = b"\xff\xd8"
SCAN = b"\xff\xda"
MAX_COUNTED = 2**24  # bytes of a file
MAX_SCANS = 500  # encoders write about ten
MAX_SCANNED = 2**31  # pixels times scans: about a second of one core
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # after the start of a scan; the others belong to its data


def without_notes(content: bytes) -> bytes:
    """Returns an image file's content; that of a PNG without its colour profile, texts and EXIF.

    Pillow decompresses them on opening, and refuses the whole image if one has more than a megabyte.
    """
    if not content.startswith(PNG):
        return content
    kept, start, position = [], 0, len(PNG)
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length  # with length, kind and checksum
        if kind in NOTES:
            kept.append(content[start:position])
            start = end
        position = end
    return b"".join([*kept, content[start:]]) if kept else content


def too_many_scans(content: bytes, pixels: int) -> str:
    """Returns what is wrong with a JPEG that decodes its pixels too often, or ''; '' for other files.

    Every scan of a progressive JPEG goes over all pixels, and an empty one takes only a few bytes.

    Args:
      content: the content of the file.
      pixels: width times height.
    """
    most = min(MAX_SCANS, MAX_SCANNED // max(pixels, 1))
    if not content.startswith(JPEG) or _count_pairs(content, SCAN) <= most:  # thumbnails, later pictures count here
        return ""
    scans, position = 0, len(JPEG)
    while position + 4 <= len(content) and scans <= most:
        kind = content[position + 1]
        if kind == 0xD9:  # end of the first picture
            break
        scans += kind == SCAN[1]
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
        found = _MARKER.search(content, position)
        if found is None:
            break
        position = found.start()
    return f"is a JPEG of more than {most} scans: save it again" if scans > most else ""


def _count_pairs(content: bytes, pair: bytes) -> int:
    """Returns how often two different bytes follow each other: `bytes.count` in a sixth of the time.

    It takes two bytes of memory for each byte, so large files are left to `bytes.count`.
    """
    if len(content) > MAX_COUNTED:
        return content.count(pair)
    values = np.frombuffer(content, np.uint8)
    return int(np.count_nonzero((values[:-1] == pair[0]) & (values[1:] == pair[1])))
