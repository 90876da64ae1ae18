"""A mistake is loud: one line that names the file, the tensor and the remedy, and nothing half-written is left."""

import dataclasses
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.helpers import checkpoints
from vocojax.convert.pickle_files import PickleFile
from vocojax.errors import ConvertError
from vocojax.pretrained import export
from vocojax.pretrained.conversion import convert, verify_target
from vocojax.pretrained.source import open_source

W = checkpoints.WORDS
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors())
    return tmp_path / "source"


def failing(source, *fragments, **options):
    """Converts, and checks the one-line error and that nothing is left behind; returns the message."""
    target = source.parent / "target"
    with pytest.raises(ConvertError) as caught:
        convert(source, target, "llava", report=lambda _: None, **options)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    assert not target.exists() and not list(source.parent.glob(".target*"))
    return message


def edit_config(source, **changes):
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | changes))


def edit_tensors(source, edit):
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors")


def test_truncated_safetensors(source):
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5000)
    failing(source, f"{path}: truncated: tensor model.vision_tower.vision_tower.", "download the file again")


def test_no_safetensors_at_all(source):
    (source / "model.safetensors").write_text("<html>404</html>")
    failing(source, f"{source / 'model.safetensors'}: can't be read")


def test_shard_missing(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(), "sharded-bin")
    lost = tmp_path / "source" / "pytorch_model-00002-of-00003.bin"
    lost.unlink()
    failing(tmp_path / "source", f"{lost}: missing; pytorch_model.bin.index.json lists 30 tensors in it, the first is "
            "model.embed_tokens.weight")


def test_shard_missing_from_the_index(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(), "sharded-bin")
    index = tmp_path / "source" / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    shard = "pytorch_model-00002-of-00003.bin"
    values["weight_map"] = {name: home for name, home in values["weight_map"].items() if home != shard}
    index.write_text(json.dumps(values))
    failing(tmp_path / "source", f"{shard}: not listed in pytorch_model.bin.index.json")


def test_tensor_missing_from_its_shard(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(), "sharded-bin")
    index = tmp_path / "source" / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    other = "pytorch_model-00003-of-00003.bin" if values["weight_map"][Q_PROJ] != "pytorch_model-00003-of-00003.bin" \
        else "pytorch_model-00001-of-00003.bin"
    values["weight_map"][Q_PROJ] = other
    index.write_text(json.dumps(values))
    failing(tmp_path / "source", f"{other}: lacks tensor {Q_PROJ}, which pytorch_model.bin.index.json lists in it")


def test_index_without_shards_and_shards_without_index(source):
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    failing(source, "holds model-00001-of-00002.safetensors but no model.safetensors.index.json")
    (source / "model-00001-of-00002.safetensors").unlink()
    failing(source, "no weights: neither model.safetensors nor pytorch_model.bin")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_pickle_with_code(tmp_path, monkeypatch):
    """What the pickle asks for is refused by its name, and not run."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(), "bin")
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save({"model.norm.weight": Evil()}, path)
    failing(tmp_path / "source", f"{path}: refused: its pickle asks for {os.system.__module__}.system")
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("content, fragment", [
    ({"step": 3}, "'step' is not a tensor"),
    ([torch.ones(2)], "holds a list instead of a dict of tensors"),
    ({"epoch": np.float64(3)}, "refused: its pickle asks for numpy"),
    (torch.nn.Linear(2, 2), "refused: its pickle asks for torch.nn.modules.linear.Linear"),
])
def test_pickle_of_other_things(tmp_path, content, fragment):
    torch.save(content, tmp_path / "file.bin")
    with pytest.raises(ConvertError, match=fragment):
        PickleFile(tmp_path / "file.bin")


def test_damaged_archives(tmp_path):
    path = tmp_path / "file.bin"
    torch.save({"a": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(ConvertError, match=r"not a complete file of torch.save .* download it again"):
            PickleFile(path)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConvertError, match=r"save it again with torch >= 1\.6"):
        PickleFile(path)


def test_pickle_that_reaches_outside_its_storage(tmp_path):
    """A tensor longer than its storage would show other bytes of the file."""
    torch.save({"a": torch.ones(4)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "short.bin", "w") as short:
        for info in whole.infolist():
            content = whole.read(info)
            short.writestr(info, content[:8] if info.filename.endswith("data/0") else content)
    with pytest.raises(ConvertError, match="tensor a lies outside its storage of 8 bytes"):
        PickleFile(tmp_path / "short.bin")


def test_pickle_views_and_dtypes(tmp_path):
    """Tensors that share a storage, start inside it, are transposed, empty or scalar, in every dtype."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"base": base, "row": base[2], "part": base[1:3, 2:5], "transposed": base.T, "scalar": torch.tensor(7),
               "empty": torch.zeros(0, 3), "broadcast": torch.ones(3, 1).expand(3, 5)}
    tensors |= {str(dtype): torch.arange(5).to(dtype) for dtype in
                (torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool)}
    torch.save({**tensors, "bf16": torch.arange(5).bfloat16(), "p": torch.nn.Parameter(base)}, tmp_path / "file.bin")
    file = PickleFile(tmp_path / "file.bin")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor.numpy(), err_msg=name)
        assert file.dtype(name) == tensor.numpy().dtype and file.shapes[name] == tuple(tensor.shape)
    np.testing.assert_array_equal(file.read("transposed", (slice(1, 3), slice(None))), base.T[1:3].numpy())
    assert file.read("bf16").astype(np.float32).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(file.read("p"), base.numpy())


def test_reader_never_executes(tmp_path):
    """Every opcode that could run something goes through `find_class`; here by hand, without torch's help."""
    for payload in (b"cbuiltins\neval\n(S'1'\ntR.", b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
                    pickle.dumps(print), b"cos\nsystem\n(S'true'\ntR.", b"cfunctools\npartial\n."):
        with zipfile.ZipFile(tmp_path / "file.bin", "w") as archive:
            archive.writestr("archive/data.pkl", payload)
        with pytest.raises(ConvertError, match=r"refused: its pickle asks for (builtins|os|functools)\."):
            PickleFile(tmp_path / "file.bin")


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_pickles_are_one_line_errors(tmp_path, data):
    """Whatever bytes of the pickle are changed, the reader reads tensors or refuses; nothing else comes of it."""
    whole = tmp_path / "whole.bin"
    if not whole.exists():
        torch.save({"a": torch.ones(4), "b": torch.arange(6).reshape(2, 3).T}, whole)
    with zipfile.ZipFile(whole) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    (head,) = (name for name in entries if name.endswith("data.pkl"))
    content = bytearray(entries[head])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(tmp_path / "damaged.bin", "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, bytes(content) if name == head else entry)
    try:
        file = PickleFile(tmp_path / "damaged.bin")
    except ConvertError as error:
        assert "\n" not in str(error)
        return
    for name, shape in file.shapes.items():
        if np.prod(shape, dtype=float) < 1e6:  # a changed shape of stride 0 may be of any size
            assert file.read(name).shape == shape


def test_missing_unexpected_and_wrongly_shaped_tensors_are_all_listed(source):
    def edit(tensors):
        tensors["model.layers.0.self_attn.bias"] = torch.ones(3)
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(72, 32)
        del tensors[Q_PROJ], tensors["model.mm_projector.2.bias"]
        tensors["model.norm.weight"] = torch.ones(31)

    edit_tensors(source, edit)
    failing(source, f"2 missing tensors: {Q_PROJ}, model.mm_projector.2.bias;",
            "2 unexpected tensors: model.layers.0.self_attn.bias, model.layers.3.mlp.up_proj.weight;",
            "1 wrongly shaped tensors: model.norm.weight [31] instead of [32]")
    failing(source, "1 missing tensors: model.mm_projector.2.bias;", "1 unexpected tensors: model.layers.3.mlp",
            allow_missing=[r"model\.layers\.[01]\..*"])


def test_tensor_under_two_names(source):
    edit_tensors(source, lambda tensors: tensors.update(
        {"mm_projector.0.bias": tensors["model.mm_projector.0.bias"].clone()}))
    failing(source, "mm_projector.0.bias and model.mm_projector.0.bias are both model.mm_projector.0.bias")


@pytest.mark.parametrize("changes, fragment", [
    ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads 5 must divide hidden_size 32"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_heads 4, got 3"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ({"attention_bias": True}, "attention_bias must be False, got True"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling of type 'yarn' is not supported"),
    ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type must be 'linear' or 'mlp2x_gelu', got 'mlp3x_gelu'"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature must be 'patch'"),
    ({"mm_vision_select_layer": -9}, "select_layer must be in [-3, -1], got -9"),
    ({"num_hidden_layers": "many"}, "num_hidden_layers must be of type int, got 'many'"),
    ({"voco": {"token_id": 7}}, f"<voco> is token 7 here and token {W} in the tokenizer"),
])
def test_configs_that_cannot_be(source, changes, fragment):
    edit_config(source, **changes)
    failing(source, f"{source / 'config.json'}: ", fragment)


def test_other_models(source):
    (source / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    failing(source, "model_type 'mistral' is not supported")
    (source / "config.json").write_text("{")
    failing(source, "config.json: not JSON")
    (source / "config.json").unlink()
    failing(source, "config.json: no such file")
    shutil.rmtree(source)
    failing(source, f"{source}: no such directory")


def test_no_tokenizer(source):
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    failing(source, f"{source}: no usable tokenizer", "--tokenizer")


def test_no_vision_tower(tmp_path):
    checkpoints.save_original(tmp_path / "source", checkpoints.original_tensors(tower=False))
    failing(tmp_path / "source", "no vision tower among the tensors", "pass its directory or file as --vision")


def test_vision_tower_of_unknown_heads(source):
    """CLIP ViT-H is 1280 wide with heads of 80; nothing in its tensors says so."""
    edit_tensors(source, lambda tensors: tensors.update({
        f"{checkpoints.TOWER}vision_model.embeddings.patch_embedding.weight": torch.zeros(1280, 3, 7, 7)}))
    failing(source, "the number of heads of a vision tower of width 1280 can't be derived", "'vision_config'")


def test_layouts_without_a_place(tmp_path):
    checkpoints.save_original(tmp_path / "linear", checkpoints.original_tensors("linear"), mm_projector_type="linear")
    with pytest.raises(ConvertError, match=r"'huggingface' does not support .* of kind 'linear'; use .* 'llava'"):
        convert(tmp_path / "linear", tmp_path / "out", "huggingface", report=lambda _: None)
    checkpoints.llama(W).save_pretrained(tmp_path / "llama")
    checkpoints.save_tokenizer(tmp_path / "llama")
    with pytest.raises(ConvertError, match="the layout 'llava' does not support a decoder alone; use 'huggingface'"):
        convert(tmp_path / "llama", tmp_path / "out", "llava", report=lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear", "llama"]


@pytest.mark.parametrize("layout", ["llava", "orbax"])
def test_export_that_dies_leaves_nothing(source, monkeypatch, layout):
    """As a full disk would, in the middle of the tensors."""
    opened = open_source(source)
    read, count = opened.weights.read, []

    def failing_read(name, index=None):
        count.append(name)
        if len(count) == 10:
            raise OSError("No space left on device")
        return read(name, index)

    monkeypatch.setattr(opened.weights, "read", failing_read)
    with pytest.raises(OSError, match="No space left"):
        export.export(opened, source.parent / "target", layout)
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_existing_target_is_left_alone(source):
    (source.parent / "target").mkdir()
    (source.parent / "target" / "precious").write_text("x")
    with pytest.raises(ConvertError, match="target: exists already; name a new directory or remove it"):
        convert(source, source.parent / "target", "llava", report=lambda _: None)
    assert [path.name for path in (source.parent / "target").iterdir()] == ["precious"]


def test_verify_sees_one_changed_value(source):
    convert(source, source.parent / "target", "llava", report=lambda _: None)
    edit_tensors(source.parent / "target", lambda tensors: tensors[Q_PROJ][3, 5].add_(2**-20))
    (source.parent / "target" / "SHA256SUMS").unlink()
    with pytest.raises(ConvertError, match=r"rounded to the target.s dtype: decoder/blocks/query/kernel; "):
        verify_target(open_source(source), source.parent / "target", lambda _: None)


def test_verify_sees_another_config(source):
    convert(source, source.parent / "target", "llava", report=lambda _: None)
    edit_config(source.parent / "target", rms_norm_eps=1e-6, vocojax=None)
    (source.parent / "target" / "SHA256SUMS").unlink()
    with pytest.raises(ConvertError, match=r"its config is .*norm_eps=1e-06.*, the source's is .*norm_eps=1e-05"):
        verify_target(open_source(source), source.parent / "target", lambda _: None)


def test_parts_that_are_there_already(source, tmp_path):
    """What the caller names is used or refused, never passed over."""
    convert(source, tmp_path / "run", "orbax", num_vocos=2, report=lambda _: None)
    failing(tmp_path / "run", "already has a vision tower and a projector", vision=tmp_path)
    failing(tmp_path / "run", "the model has 2 VoCo tokens per unit, not 4; leave out --num_vocos", num_vocos=4)
    failing(source, "is also in", projector=source / "model.safetensors")


@pytest.mark.parametrize(("part", "kind"), [("text_config", "granite"), ("vision_config", "siglip_vision_model")])
def test_other_architectures_with_the_same_tensor_names_are_refused(tmp_path, part, kind):
    checkpoints.save_huggingface(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    values = json.loads(path.read_text())
    values[part]["model_type"] = kind
    path.write_text(json.dumps(values))
    failing(tmp_path / "source", f"{part}.model_type '{kind}' is not supported")


def test_a_failed_verification_leaves_no_target(source, monkeypatch):
    monkeypatch.setattr("vocojax.pretrained.conversion._compare", lambda *_: (1.0, False))
    failing(source, "verification failed: these parameters are not the source's", verify=True)


def test_an_overflow_of_the_target_s_dtype_is_no_success(source):
    tensors = load_file(source / "model.safetensors") if (source / "model.safetensors").exists() else None
    if tensors is None:
        tensors = checkpoints.original_tensors()
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e6)
    shutil.rmtree(source)
    checkpoints.save_original(source, tensors)
    failing(source, "dtype: decoder/norm/scale; convert the source again, with a wider --dtype", verify=True,
            dtype="float16")


def test_template_and_fit_survive_an_export(source, tmp_path):
    opened = open_source(source)
    card = dataclasses.replace(opened.card, template="released", fit="crop")
    export.export(dataclasses.replace(opened, card=card), tmp_path / "out", "huggingface")
    again = open_source(tmp_path / "out").card
    assert (again.template, again.fit) == ("released", "crop")
