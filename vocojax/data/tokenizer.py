"""Tokenizers: any fast Hugging Face tokenizer with `<voco>` added, and a word tokenizer for closed vocabularies."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vocojax.errors import InputError
from vocojax.layout import Encoded
from vocojax.sums import require_small_files

VOCO_TOKEN = "<voco>"


def open_huggingface(directory: str | Path) -> PreTrainedTokenizerBase:
    """Opens a directory's own tokenizer, without `<voco>` if it lacks it.

    Raises:
      OSError, ValueError, KeyError, TypeError: transformers can't use what is there.
    """
    config = None
    if (Path(directory) / "config.json").is_file():
        values, _ = PreTrainedConfig.get_config_dict(str(directory), local_files_only=True)
        if values.get("model_type") not in (None, *CONFIG_MAPPING):  # such as llava_llama
            config = PreTrainedConfig.from_dict(values)  # as transformers would, which warns that it guesses
    return AutoTokenizer.from_pretrained(str(directory), config=config, local_files_only=True, legacy=False)


class Tokenizer:
    """A Hugging Face tokenizer with `<voco>`; it is a `layout.TextTokenizer`.

    Attributes:
      huggingface: the Hugging Face tokenizer.
      bos_id: id of BOS.
      eos_id: id of EOS.
      eos_token: text of EOS.
      voco_id: id of `<voco>`.

    Args:
      tokenizer: a tokenizer backed by the `tokenizers` library, with BOS and EOS. `<voco>` is added if it is missing
        (with Vicuna's tokenizer its id is 32000).

    Raises:
      InputError: the tokenizer has no BOS or EOS, or is a slow one.
    """

    voco_token = VOCO_TOKEN

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} keeps no character offsets: load its fast version")
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is None:
                raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no {name.removesuffix('_id')}")
        tokenizer.add_tokens([VOCO_TOKEN], special_tokens=True)
        self.huggingface = tokenizer
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
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"tokenizer directory {str(directory)!r} does not exist")
        require_small_files(directory)
        try:
            return cls(open_huggingface(directory))
        except OSError as error:
            raise InputError(f"{str(directory)!r} holds no usable tokenizer: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer files that `from_directory` and transformers load."""
        self.huggingface.save_pretrained(str(directory))

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
