"""Tokenizer files are taken as they are: ids are those that the files define, whatever class they name."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vocojax.data import tokenizer as tokenizers_of_ours
from vocojax.data.tokenizer import PROBES, Tokenizer, word_tokenizer
from vocojax.errors import InputError

SENTENCES = ["what color is the big red bus in the picture ? the bus is red . 12 34 yes"] * 50
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True}


def save_config(directory, **values):
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **values}))


def sentencepiece_directory(directory, changes, **config):
    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(directory / "tokenizer"), byte_fallback=True, unk_id=0,
        bos_id=1, eos_id=2, pad_id=-1, split_digits=True, hard_vocab_limit=False, minloglevel=2,
        **{"vocab_size": 320, "model_type": "bpe", **PLAIN, **changes})
    save_config(directory, **config)
    return directory


def byte_level_directory(directory, **config):
    directory.mkdir()
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.save(str(directory / "tokenizer.json"))
    save_config(directory, **config)
    return directory


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("changes", [
    {}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True},
    {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    {"model_type": "unigram", "vocab_size": 300}, {"user_defined_symbols": ["<|im_start|>"]},
], ids=["llama", "yi", "merged", "merged_yi", "open_llama", "unigram", "symbols"])
def test_sentencepiece_settings_are_honoured(tmp_path, changes, legacy):
    directory = sentencepiece_directory(tmp_path / "own", changes, legacy=legacy)
    own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_directory(tmp_path / "saved")
    for text in (*PROBES, "the  red   bus  ", "yes", "\n", ""):
        assert tokenizer.encode(text).ids == own.encode(text) == again.encode(text).ids, text
    assert tokenizer.decode(tokenizer.encode("the bus is red").ids) == "the bus is red"
    assert tokenizer.voco_id == again.voco_id == own.get_piece_size()
    assert again.had_voco and not tokenizer.had_voco


@pytest.mark.parametrize(("legacy", "prefix"), [(True, ["\u2581"]), (False, [])])
def test_legacy_is_kept(tmp_path, legacy, prefix):
    """With legacy=True a text after a special token begins with a space, as in the slow tokenizer of LLaMA."""
    tokenizer = Tokenizer.from_directory(sentencepiece_directory(tmp_path / "own", {}, legacy=legacy))
    tokenizer.save(tmp_path / "saved")
    for one in (tokenizer, Tokenizer.from_directory(tmp_path / "saved")):
        tokens = one.huggingface.convert_ids_to_tokens(one.encode("<voco>\nyes").ids)
        assert tokens[: 2 + len(prefix)] == ["<voco>", *prefix, "<0x0A>"]
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["legacy"] is legacy


@pytest.mark.parametrize(("changes", "config", "saved"), [
    ({}, {}, False), ({"add_dummy_prefix": False}, {"legacy": False}, True),
], ids=["not_said", "yi"])
def test_slow_tokenizers_are_told_what_the_files_do(tmp_path, changes, config, saved):
    """That of transformers 4.37 takes no entry for legacy=True, and with legacy=False adds a space that Yi lacks."""
    Tokenizer.from_directory(sentencepiece_directory(tmp_path / "own", changes, **config)).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["legacy"] is saved


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "Unheard"])
def test_the_class_that_a_file_names_does_not_matter(tmp_path, name):
    directory = byte_level_directory(tmp_path / "own", tokenizer_class=name)
    (directory / "config.json").write_text(json.dumps({"model_type": "llava_llama", "rope_scaling": {"factor": 8.0}}))
    ours = Tokenizer.from_directory(directory)
    theirs = Backend.from_file(str(directory / "tokenizer.json"))
    for text in PROBES:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text).ids) == text


def test_a_baked_in_truncation_cuts_no_text(tmp_path):
    directory = byte_level_directory(tmp_path / "own")
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    whole = backend.encode(SENTENCES[0], add_special_tokens=False).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_token="</s>")
    backend.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_directory(directory).encode(SENTENCES[0]).ids == whole


def test_files_that_disagree_are_refused(tmp_path):
    directory = sentencepiece_directory(tmp_path / "own", {})
    Tokenizer.from_directory(directory).huggingface.save_pretrained(str(directory))
    Tokenizer.from_directory(directory)  # both files, which agree
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.pre_tokenizer, backend.normalizer = None, normalizers.Replace(" ", "\u2581")
    backend.save(str(directory / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer\.model: 'what color is the bus \?' has .* delete the wrong"):
        Tokenizer.from_directory(directory)


def test_a_library_that_reads_other_ids_is_refused(tmp_path, monkeypatch):
    """As transformers 5.0 did with byte-level files that name LLaMA's class."""
    directory = byte_level_directory(tmp_path / "own")
    opened = tokenizers_of_ours.PreTrainedTokenizerFast.from_pretrained

    def rebuilt(*args, **kwargs):
        tokenizer = opened(*args, **kwargs)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        return tokenizer

    monkeypatch.setattr(tokenizers_of_ours.PreTrainedTokenizerFast, "from_pretrained", rebuilt)
    with pytest.raises(InputError, match=r"tokenizer\.json: .* by this file, and .* as it is read here"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(("file", "entry"), [
    ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Evil"]}), ("tokenizer_config.json", ["evil.Evil", None]),
    ("config.json", {"AutoConfig": "evil.Evil"}),
])
def test_code_of_a_directory_is_never_executed(tmp_path, file, entry):
    directory = tmp_path / "own"
    word_tokenizer(["a red bus"]).save(directory)
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w')\nclass Evil: pass\n")
    path = directory / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"tokenizer_class": "Evil", "auto_map": entry}))
    script = f"from vocojax.data.tokenizer import Tokenizer; Tokenizer.from_directory({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", script], input="y\n" * 9, capture_output=True, text=True)
    assert f"{file}: auto_map asks to run Python code of the directory (evil.Evil)" in done.stderr
    assert not (tmp_path / "EXECUTED").exists()


def test_sources_of_an_export_are_no_foreign_code(tmp_path):
    word_tokenizer(["a red bus"]).save(tmp_path)
    values = {"auto_map": {"AutoConfig": "configuration_voco_llava.VocoLlavaConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Tokenizer.from_directory(tmp_path).had_voco


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{" * 5000, '{"model": 1}'])
def test_damaged_files_are_refused(tmp_path, content):
    word_tokenizer(["a red bus"]).save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="no usable tokenizer"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    if content not in ("{}", '{"model": 1}'):  # these are settings
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(InputError, match=r"tokenizer_config\.json: (not JSON|must hold)|no usable tokenizer"):
            Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer.from_directory(tmp_path)


def test_what_slow_tokenizers_need_is_saved(tmp_path):
    """transformers 4.37 builds LLaMA's slow tokenizer from these files."""
    directory = sentencepiece_directory(tmp_path / "own", {})
    Tokenizer.from_directory(directory).save(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert (saved / "tokenizer.model").read_bytes() == (directory / "tokenizer.model").read_bytes()
    config = json.loads((saved / "tokenizer_config.json").read_text())
    voco = Tokenizer.from_directory(saved).voco_id
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert config["added_tokens_decoder"][str(voco)]["content"] == "<voco>"
    assert json.loads((saved / "added_tokens.json").read_text()) == {"<voco>": voco}
    assert json.loads((saved / "special_tokens_map.json").read_text()) == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<voco>"]}


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_chat_templates_are_kept(tmp_path, file):
    word_tokenizer(["a red bus"]).save(tmp_path / "own")
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "own" / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    Tokenizer.from_directory(tmp_path / "own").save(tmp_path / "saved")
    assert Tokenizer.from_directory(tmp_path / "saved").huggingface.chat_template == text


def test_a_missing_pytorch_is_no_news(monkeypatch):
    logger, seen = logging.getLogger("transformers"), []
    monkeypatch.setattr(logger, "callHandlers", lambda record: seen.append(record.getMessage()))
    (message,) = re.findall(r'"(PyTorch was not found.*)"', Path(transformers.__file__).read_text())
    logger.warning(message)
    logger.warning("another warning")
    assert seen == ["another warning"]
