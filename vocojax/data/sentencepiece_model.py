"""SentencePiece models (`tokenizer.model`), read as a pipeline of the library `tokenizers`.

The model says itself how it treats spaces and characters, and this differs between families: LLaMA writes a space
before each text, Yi does not, and OpenLLaMA also merges spaces and applies NFKC.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from vocojax.errors import InputError

SPACE = "\u2581"  # what a space becomes in the vocabulary
_UNIGRAM, _BPE = 1, 2  # types of models
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of pieces


def read_sentencepiece(path: Path, legacy: bool) -> BackendTokenizer:
    """Reads a SentencePiece model.

    Args:
      path: the file.
      legacy: whether the text after a special token begins as a text of its own, so with a space where the model adds
        one. It is the entry `legacy` of `tokenizer_config.json`.

    Raises:
      InputError: the file is not a SentencePiece model, or its kind is not supported.
    """
    proto = _read_proto(path)
    backend = BackendTokenizer(_model(proto, path))
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Where a space is added to the first text only, one that is there already takes its place.
        ends = r" +\z" if spec.add_dummy_prefix and not legacy else r"\A +| +\z"
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(ends), "")]
    if legacy and spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if legacy or not spec.add_dummy_prefix:
        steps.append(normalizers.Replace(" ", SPACE))
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    backend.normalizer = normalizers.Sequence(steps) if steps else None  # type: ignore[assignment]
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(plain + [decoders.Strip(" ", left=1)] * spec.add_dummy_prefix)
    backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
                        for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)])
    return backend


def is_sentencepiece(path: Path) -> bool:
    """Returns whether a file is there and is a SentencePiece model."""
    try:
        return path.is_file() and bool(_read_proto(path))
    except InputError:
        return False


def special_tokens(path: Path) -> dict[str, str]:
    """Returns the texts of a model's own BOS, EOS and unknown token, by transformers' names for them."""
    trainer = _read_proto(path).trainer_spec
    texts = {"bos_token": (trainer.bos_id, trainer.bos_piece), "eos_token": (trainer.eos_id, trainer.eos_piece),
             "unk_token": (trainer.unk_id, trainer.unk_piece)}
    return {name: text for name, (id_, text) in texts.items() if id_ >= 0}


def encode_by_sentencepiece(path: Path, text: str) -> list[int]:
    """Returns the ids of a text by the library `sentencepiece` itself.

    Raises:
      InputError: the file is not a SentencePiece model.
    """
    try:
        return list(sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: not a SentencePiece model ({error}); download the file again") from None


def _read_proto(path: Path) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's own class of errors depends on its implementation
        kind = type(error).__name__
        raise InputError(f"{path}: not a SentencePiece model ({kind}); download the file again") from None
    if not proto.pieces or not proto.normalizer_spec.escape_whitespaces:
        raise InputError(f"{path}: not a SentencePiece model that is supported; pass a directory with a tokenizer.json")
    return proto


def _model(proto: Any, path: Path) -> models.Model:
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type != _BPE:
        raise InputError(f"{path}: a SentencePiece model of words or characters is not supported; pass a directory "
                         "with a tokenizer.json")
    return models.BPE({piece.piece: id_ for id_, piece in enumerate(pieces)}, _merges(pieces), fuse_unk=True,
                      unk_token=trainer.unk_piece, byte_fallback=trainer.byte_fallback)


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Returns all pairs of pieces that make a piece, best first: SentencePiece keeps the pieces' scores only."""
    ids = {piece.piece: id_ for id_, piece in enumerate(pieces) if piece.type == _NORMAL}
    found = []
    for whole, id_ in ids.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ids and right in ids:
                found.append((-pieces[id_].score, id_, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
