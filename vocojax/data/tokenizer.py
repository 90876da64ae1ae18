"""Tokenizers: any fast Hugging Face tokenizer with `<voco>` added, and a word tokenizer for closed vocabularies.

A directory's files are taken as they are: `tokenizer.json`, or else `tokenizer.model`. transformers' classes for single
families are not used, since some of them build another pipeline than the file says (a space before each text, no NFKC).
No code of a directory is ever executed.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vocojax.data.sentencepiece_model import (
    encode_by_sentencepiece,
    is_sentencepiece,
    read_sentencepiece,
    special_tokens,
)
from vocojax.errors import InputError
from vocojax.hub import local_copy
from vocojax.layout import Encoded
from vocojax.sums import require_small_files

VOCO_TOKEN = "<voco>"
_CONFIG, _JSON, _MODEL = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"
# Modules of the sources that exports carry, see `pretrained.pytorch`: of the config, the model and the processor.
OWN_MODULES = ("configuration_voco_llava", "modeling_voco_llava", "processing_voco_llava")
_OWN_CODE = re.compile(rf"({'|'.join(OWN_MODULES)})\.\w+")  # a reference to them
# What a tokenizer needs in addition to its vocabulary.
_SETTINGS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"
# Short texts in which tokenizers differ that were read wrongly: spaces, newlines, digits, other scripts, wide forms.
PROBES = ("what color is the bus ?", "two  spaces and a\nnewline", "12345 and \uff57ide",
          "caf\u00e9 \u56fe\u50cf \U0001f642")


def open_huggingface(directory: str | Path) -> PreTrainedTokenizerFast:
    """Opens a directory's own tokenizer, without `<voco>` if it lacks it.

    Raises:
      InputError: the directory has neither `tokenizer.json` nor `tokenizer.model`, a file asks for Python code of its
        own, or the ids are not those that the files define.
      OSError, ValueError, KeyError, TypeError: the files are damaged.
    """
    directory = Path(directory)
    config = _read_config(directory)
    if (directory / _JSON).is_file():
        backend = _read_backend(directory / _JSON)
    elif (directory / _MODEL).is_file():
        backend = read_sentencepiece(directory / _MODEL, bool(config.get("legacy", False)))
        config = {**special_tokens(directory / _MODEL), "add_bos_token": True, **config}
    else:
        raise InputError(f"{directory}: holds neither {_JSON} nor {_MODEL}")
    with tempfile.TemporaryDirectory() as name:  # transformers sees these files and no others
        clean = Path(name)
        for setting in _SETTINGS:
            if (directory / setting).is_file():
                shutil.copyfile(directory / setting, clean / setting)
        if (directory / _TEMPLATES).is_dir():
            shutil.copytree(directory / _TEMPLATES, clean / _TEMPLATES)
        backend.save(str(clean / _JSON))
        _write(clean / _CONFIG, _with_defaults(config, clean, backend))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = str(directory)
    if tokenizer.chat_template is None and (directory / "chat_template.json").is_file():  # of transformers 4
        tokenizer.chat_template = _read(directory / "chat_template.json").get("chat_template")
    _compare(directory, tokenizer)
    return tokenizer


def _read_backend(path: Path) -> BackendTokenizer:
    """Reads `tokenizer.json`, without the truncation and padding that it may ask for."""
    backend = BackendTokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}; download the file again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a JSON object; download the file again")
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_config(directory: Path) -> dict[str, Any]:
    """Reads `tokenizer_config.json`.

    Raises:
      InputError: an `auto_map` names code of the directory's own. The files that vocojax writes into exports are no
        tokenizer, and reading needs none of them.
    """
    config = _read(directory / _CONFIG) if (directory / _CONFIG).is_file() else {}
    model = _read(directory / "config.json") if (directory / "config.json").is_file() else {}
    for name, values in ((_CONFIG, config), ("config.json", model)):
        if foreign := foreign_code(values):
            raise InputError(f"{directory / name}: auto_map asks to run Python code of the directory ({foreign}), "
                             "which vocojax never does; remove the entry if the other files are complete without it")
    return config


def foreign_code(values: Mapping[str, Any]) -> str | None:
    """Returns a reference in the entry `auto_map` to code other than what vocojax writes into exports, or None."""
    auto_map = values.get("auto_map") or {}
    named = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    references = [one for value in named for one in (value if isinstance(value, list) else [value]) if one is not None]
    return next((str(one) for one in references if not _OWN_CODE.fullmatch(str(one))), None)


def _with_defaults(config: dict[str, Any], clean: Path, backend: BackendTokenizer) -> dict[str, Any]:
    """Returns the settings for the class that takes `tokenizer.json` as it is.

    LLaMA's class pads on the left and has `<s>`, `</s>` and `<unk>` where the files do not name other tokens.
    """
    named = config.keys() | (_read(clean / _SETTINGS[0]).keys() if (clean / _SETTINGS[0]).is_file() else set())
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    defaults = {name: text for name, text in own.items() if name not in named and backend.token_to_id(text) is not None}
    if str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        defaults["padding_side"] = "left"
    kept = {name: value for name, value in config.items() if name not in ("auto_map", "tokenizer_file", "vocab_file")}
    return defaults | kept | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _compare(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Compares ids with an independent reading of each file.

    Raises:
      InputError: they differ.
    """
    readings = {}
    if (directory / _JSON).is_file():
        own = _read_backend(directory / _JSON)
        readings[_JSON] = lambda text: own.encode(text, add_special_tokens=False).ids
    if is_sentencepiece(directory / _MODEL):  # Llama 3 has another kind of file under this name
        readings[_MODEL] = lambda text: encode_by_sentencepiece(directory / _MODEL, text)
    for text in PROBES:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        for name, read in readings.items():
            if (expected := read(text)) != ids:
                raise InputError(f"{directory / name}: {text!r} has the ids {expected} by this file, and {ids} as it "
                                 f"is read here; pass a tokenizer directory whose files agree (if it has both {_JSON} "
                                 f"and {_MODEL}, delete the wrong one)")


class Tokenizer:
    """A Hugging Face tokenizer with `<voco>`; it is a `layout.TextTokenizer`.

    Attributes:
      huggingface: the Hugging Face tokenizer.
      bos_id: id of BOS.
      eos_id: id of EOS.
      eos_token: text of EOS.
      voco_id: id of `<voco>`.
      had_voco: whether the tokenizer had `<voco>` already.
      sentencepiece: content of the directory's `tokenizer.model`, or None. Slow tokenizers need it, so it travels with
        runs and exports.

    Args:
      tokenizer: a tokenizer backed by the `tokenizers` library, with BOS and EOS. `<voco>` is added if it is missing
        (with Vicuna's tokenizer its id is 32000).
      sentencepiece: see above.

    Raises:
      InputError: the tokenizer has no BOS or EOS, or is a slow one.
    """

    voco_token = VOCO_TOKEN

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentencepiece: bytes | None = None):
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} keeps no character offsets: load its fast version")
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is None:
                raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no {name.removesuffix('_id')}")
        self.had_voco = VOCO_TOKEN in tokenizer.get_vocab()
        tokenizer.add_tokens([VOCO_TOKEN], special_tokens=True)
        self.huggingface = tokenizer
        self.sentencepiece = sentencepiece
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.eos_token: str = tokenizer.eos_token
        self.voco_id = int(tokenizer.convert_tokens_to_ids(VOCO_TOKEN))  # type: ignore[arg-type]

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Loads the tokenizer files of a directory.

        Raises:
          FileNotFoundError: no such directory.
          InputError: no usable tokenizer in it.
        """
        directory = local_copy(directory)
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"tokenizer directory {str(directory)!r} does not exist")
        require_small_files(directory)
        try:
            model = Path(directory) / _MODEL
            return cls(open_huggingface(directory), model.read_bytes() if is_sentencepiece(model) else None)
        except InputError:
            raise
        except Exception as error:  # the libraries raise anything for a damaged file
            raise InputError(f"{str(directory)!r} holds no usable tokenizer: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer files that `from_directory` and transformers from 4.37 load.

        With a `tokenizer.model` the class is `LlamaTokenizer`, whose slow version the original code loads.
        """
        directory = Path(directory)
        self.huggingface.save_pretrained(str(directory))
        if self.sentencepiece is not None:
            (directory / _MODEL).write_bytes(self.sentencepiece)
        added = self.huggingface.backend_tokenizer.get_added_tokens_decoder()
        _write(directory / "added_tokens.json", {
            token.content: id_ for id_, token in sorted(added.items()) if id_ >= self.huggingface.vocab_size})
        specials = {name: str(token) for name, token in self.huggingface.special_tokens_map.items()
                    if not isinstance(token, list)}
        _write(directory / _SETTINGS[0], {**specials, "additional_special_tokens": [VOCO_TOKEN]})
        legacy = {} if self.sentencepiece is None else {"legacy": self._is_legacy()}
        _write(directory / _CONFIG, _read(directory / _CONFIG) | legacy | {
            "tokenizer_class": "PreTrainedTokenizerFast" if self.sentencepiece is None else "LlamaTokenizer",
            "added_tokens_decoder": {str(id_): {
                "content": token.content, "lstrip": token.lstrip, "rstrip": token.rstrip,
                "normalized": token.normalized, "single_word": token.single_word, "special": token.special,
            } for id_, token in sorted(added.items())},
        })

    def _is_legacy(self) -> bool:
        """Returns whether the text after a special token begins as a text of its own; slow tokenizers are told so."""
        alone, after = self.encode("a"), self.encode(f"{self.eos_token}a")
        return after.ids[1:] == alone.ids

    @property
    def vocabulary_digest(self) -> str:
        """Digest of the tokens and their ids, which a run's checkpoints hold."""
        vocabulary = json.dumps(self.huggingface.get_vocab(), sort_keys=True).encode()
        return hashlib.blake2b(vocabulary, digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.huggingface)

    def encode(self, text: str) -> Encoded:
        """Returns the ids of a text, without BOS or EOS; special tokens in the text become their ids."""
        encoding = self.huggingface.backend_tokenizer.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, [end for _, end in encoding.offsets])

    @property
    def has_unknown_words(self) -> bool:
        """True if some texts can't be written in this vocabulary; one that falls back to bytes writes every text."""
        is_bytes = getattr(self.huggingface.backend_tokenizer.model, "byte_fallback", False)
        return self.huggingface.unk_token_id is not None and not is_bytes

    def unknown_words(self, text: str) -> list[str]:
        """Returns the pieces of a text that become the unknown token, in their order."""
        if not self.has_unknown_words:
            return []
        encoding = self.huggingface.backend_tokenizer.encode(text, add_special_tokens=False)
        pieces = [text[slice(*place)] for id_, place in zip(encoding.ids, encoding.offsets, strict=True)
                  if id_ == self.huggingface.unk_token_id]
        return [piece for piece in pieces if piece != self.huggingface.unk_token]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids, without special tokens."""
        return str(self.huggingface.decode(list(ids), skip_special_tokens=True))


def word_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Makes a tokenizer whose tokens are the words, punctuation marks and newlines of the texts, in sorted order."""
    pieces = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words = sorted({piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)} | {"\n"})
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    backend = BackendTokenizer(models.WordLevel({w: i for i, w in enumerate(specials + words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pieces
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return Tokenizer(fast)
