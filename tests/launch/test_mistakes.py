"""Typical mistakes at a command line: each ends with one line that names the place, the thing and a remedy."""

import errno
import json
import os
import signal
import sys

import pytest
from absl import flags

from vocojax.cli.main import main
from vocojax.config import config_to_dict
from vocojax.runs import owner

CONFIG = """from ml_collections import ConfigDict
import json
from vocojax.training.config import all_keys

def get_config(which=""):
    return ConfigDict(all_keys(**json.loads({values!r})))
"""
TRAIN = "train --config={root}/tiny.py --workdir={root}/run"
ANSWER = "answer --checkpoint={root}/none --store={root}/store"
REPORT = "report --config={root}/tiny.py --topology=v5e:2x2"

MISTAKES = [
    # verbs and flags
    ("", "a verb is missing: vocojax VERB [FLAGS]"),
    ("anwser", "unknown verb 'anwser', did you mean answer?; vocojax --help lists the verbs"),
    ("--store=x answer", "the verb comes first: vocojax VERB [FLAGS], got --store=x"),
    ("train", "--config must have a value"),
    ("train --config={root}/tiny.py", "--workdir must have a value"),
    (TRAIN + " now", "unexpected arguments: now"),
    (TRAIN + " --wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    (TRAIN + " --profile=a,b", "--profile=['a', 'b']: must be FIRST,LAST: the numbers of two steps"),
    (TRAIN + " --num_processes=2", "must be given together, got None, 2 and None"),
    # config files
    ("train --workdir=w --config=nowhere.py", "--config=nowhere.py: there is no such file; stages: alignment, "),
    ("train --workdir=w --config=vocoo", "did you mean configs/voco.py? stages: alignment, "),
    ("train --workdir=w --config={root}", "--config={root}: there is no such file"),
    ("train --workdir=w --config=voco:tiny2", "preset must be one of ['clip_l_224_vicuna_7b', "),
    ("train --workdir=w --config=quickstart:x", "stage 'x' is unknown: alignment, upper_bound, voco_N, voco_N+own, "),
    ("train --workdir=w --config={root}/records.json", "must be a Python file with a function get_config"),
    ("config vocoo", "did you mean configs/voco.py? stages: "),
    ("config voco nothing", "no key of the config begins with 'nothing' or holds it"),
    # keys and values
    (TRAIN + " --config.step=4", "--config.step is not a key of the config; did you mean steps?"),
    (TRAIN + " --config.row_length=4", "--config.row_length is not a key of the config; did you mean data.row_length?"),
    (TRAIN + " --config.steps=many", "steps must be of type int, got 'many'"),
    (TRAIN + " --config.steps=0", "steps must be >= 1, got 0"),
    (TRAIN + " --config.learning_rates=[vision", "learning_rates must be written as JSON or Python do, in"),
    (TRAIN + ' --config.learning_rates=[["vision/.*",0]]', "has for 'vision/.*' a multiplier that is not > 0; "),
    (TRAIN + ' --config.learning_rates=[["vision/.*",1]]', "learning_rates "),
    (TRAIN + " --config.lora.rank=4 --config.lora.targets=(", "lora.targets has the invalid regex '('"),
    (TRAIN + " --config.lora.rank=4 --config.lora.targets=nothing", "lora.targets"),
    (TRAIN + " --config.visibility=vocoo", "visibility must be one of 'voco', 'causal', got 'vocoo'"),
    (TRAIN + " --config.remat=ful", "remat must be one of ['attention_out', 'full', 'minimal', 'none', 'offload']"),
    (TRAIN + " --config.attention=flash", "attention must be one of ['chunked', 'pallas_gpu', "),
    (TRAIN + " --config.data.keep_in_memory=maybe", "--config.data.keep_in_memory=maybe: "),
    (TRAIN + " --config.data.template=vicuna", "data.template must be one of ['bare', 'plain', 'released', "),
    (TRAIN + " --config.data.source=lava", "data.source must be one of 'llava', "),
    (TRAIN + " --config.data.fit=padding", "data.fit must be one of 'pad', "),
    (TRAIN + " --config.data.mixture={{", "--config.data.mixture must be written as JSON or Python do, in quotes"),
    (TRAIN + ' --config.data.mixture=[{{"sauce":"webvid"}}]', "data.mixture[0].sauce is not a key of PartConfig; "),
    (TRAIN + " --config.model.voco.num_vocos=0", "model.voco.num_vocos must be >= 1, got 0"),
    (TRAIN + " --config.model.voco.token_id=9999", "model.voco.token_id must be below "),
    (TRAIN + " --config.batch_size=4 --config.accumulate=3", "accumulate must divide batch_size 4, got 3"),
    (TRAIN + " --config.mesh.fsdp=3", "mesh slice x data x fsdp x tensor must multiply to the "),
    (TRAIN + " --config.plan=two_stage --config.visibility=causal", "visibility must be 'voco' for plan 'two_stage'"),
    (TRAIN + " --config.model.compressor.kind=avg_pool", "visibility must be 'causal' for the baseline 'avg_pool'"),
    (TRAIN + " --config.checkpoint.keep_best=1 --config.checkpoint.best_metric=validation/loss",
     "checkpoint.every must be"),
    # data
    (TRAIN + " --config.data.tokenizer=", "data.tokenizer must name a tokenizer directory, got ''"),
    (TRAIN + " --config.data.tokenizer={root}/none", "data.tokenizer must be usable: tokenizer directory "),
    (TRAIN + " --config.data.tokenizer={root}/empty", "data.tokenizer must be usable: "),
    (TRAIN + " --config.data.path=", "data.path must name the file of a llava source"),
    (TRAIN + " --config.data.path={root}/none.json", "data.path must be readable as 'llava': "),
    (TRAIN + " --config.data.path={root}/empty", "data.path must be readable as 'llava': "),
    (TRAIN + " --config.data.path={root}/tiny.py", "data.path must be readable as 'llava': "),
    (TRAIN + " --config.data.path={root}/no_records.json", "no record"),
    (TRAIN + " --config.data.path={root}/unanswered.json", "were skipped (no target: 11), more than data.max_"),
    (TRAIN + " --config.data.image_root={root}/empty",
     "all 11 looked for were missing below {root}/empty; the first is {root}/empty/0.png"),
    (TRAIN + " --config.data.images_per_row=0", "data.images_per_row must be >= 1, got 0"),
    (TRAIN + " --config.data.row_length=3", "record"),
    (TRAIN + " --config.validation.every=2 --config.validation.path={root}/none.json --config.validation.image_root=.",
     "validation: data.path must be readable as 'llava'"),
    ("check_data --config={root}/tiny.py --output={root}/check --config.data.path={root}/unanswered.json",
     "none of the 12 records can be used: {root}/check/bad.csv says why"),
    # weights
    (TRAIN + " --config.init_from={root}/none", "{root}/none"),
    (TRAIN + " --config.init_from={root}/empty", "{root}/empty"),
    (TRAIN + " --config.init_new=nothing", "init_new has the regex 'nothing', which matches no parameter: names are"),
    (TRAIN + " --config.distill.teacher={root}/none", "{root}/none"),
    # places
    ("train --config={root}/tiny.py --workdir={root}/records.json", "{root}/records.json"),
    ("train --config={root}/tiny.py --workdir=hf://org/name", "workdir can't be on the hub, which is only read"),
    ("train --config={root}/tiny.py --workdir=s4://bucket/run", "has an unknown scheme before '://'; use a local"),
    # other commands
    (ANSWER, "give --image and --question, or --video and --question, or --questions=FILE.jsonl"),
    (ANSWER + " --image=a.png --question=what", "{root}/none"),
    ("compress --checkpoint={root}/none --store={root}/store --images={root}/*.gif", "{root}/*.gif"),
    ("convert --source={root}/none --target={root}/out --target_layout=orbax", "{root}/none"),
    ("convert --source=x --target={root}/out --target_layout=orbit", "--target_layout=orbit: value should be one of"),
    ("evaluate --benchmarks=pop --data_root={root} --checkpoint=x --output={root}/out", "pop"),
    ("report --config={root}/tiny.py --topology=tpu7x:2x2x1", "topology 'tpu7x:2x2x1' is of a generation whose costs"),
    ("report --config={root}/tiny.py --topology=v5x:2x2", "topology must look like v5p:4x4x4, v5e:16x16*2"),
    ("report --topology=v5e:2x2", "--config must have a value"),
    ("report --config={root}/tiny.py --topology=v5e:2x2*0", "topology must look like v5p:4x4x4"),
    (REPORT + " --compare-remat --rows=1", "--rows goes with --search"),
    (REPORT + " --policies=full", "--policies goes with --search or --compare-remat"),
    (REPORT + " --search --compare-remat", "give one of them"),
    ("agreement --checkpoint={root}/none", "{root}/none"),
    ("prepare_data --target={root}/out --shard=4", "Unknown command line flag 'shard'"),  # which is not Beam's
    ("prepare_data --target={root}/out images --shards=4", "Beam's come after `--`"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory, llava_data):
    """A directory with a config file, and files that are wrong in one way each."""
    place = tmp_path_factory.mktemp("mistakes")
    (place / "empty").mkdir()
    (place / "no_records.json").write_text("[]")
    records = json.loads((llava_data / "records.json").read_text())
    (place / "records.json").write_text(json.dumps(records))
    for record in records:
        record["conversations"] = record["conversations"][:1]
    (place / "unanswered.json").write_text(json.dumps(records))
    return place


@pytest.fixture
def vocojax(root, stage, capsys, monkeypatch):
    """Runs a command in this process; returns its status, and what it wrote to standard error at its end."""
    (root / "tiny.py").write_text(CONFIG.format(values=json.dumps(config_to_dict(stage))))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handler, known = signal.getsignal(signal.SIGTERM), set(flags.FLAGS)

    def run(*arguments):
        capsys.readouterr()
        code = None
        monkeypatch.setattr(sys, "argv", ["vocojax", *arguments])
        try:
            main(["vocojax", *arguments])
        except SystemExit as ended:
            code = ended.code
        finally:
            signal.signal(signal.SIGTERM, handler)
            for name in set(flags.FLAGS) - known:
                if str(flags.FLAGS.find_module_defining_flag(name)).startswith("vocojax."):
                    delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
            flags.FLAGS(["test"])
        written = capsys.readouterr()
        print(written.out, end="")  # for who looks at it
        lines = [*written.err.splitlines(), *([code] if isinstance(code, str) else [])]
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:] or not code, lines
        return (1, errors[0]) if isinstance(code, str) else (code or 0, "".join(errors))

    return run


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command[:60] for command, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_place_the_thing_and_the_remedy(vocojax, root, command, message):
    arguments = [word.format(root=root) for word in command.split()]
    status, said = vocojax(*arguments)
    assert status == 1 and said.startswith("error: ") and "\n" not in said, said
    assert message.format(root=root) in said
    assert len(said) > 40 and "Traceback" not in said and "Error:" not in said


def test_there_are_sixty_of_them():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "No space left on device; free some there, or name another place"),
    (errno.EROFS, "Read-only file system; name a place that can be written"),
    (errno.EACCES, "Permission denied; name a place that this user may use"),
])
def test_a_disk_that_is_full_or_read_only_is_a_line(vocojax, root, monkeypatch, number, remedy):
    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(owner, "_claim", fail)
    status, said = vocojax("train", f"--config={root}/tiny.py", f"--workdir={root}/run")
    assert (status, said) == (1, f"error: {root}/run/owner.json: {remedy}")


def test_what_goes_wrong_in_a_run_is_a_line(vocojax, root, tmp_path):
    """A loss that is no number, and another config, mesh or shape for what a run has begun."""
    train = ["train", f"--config={root}/tiny.py", f"--workdir={tmp_path}/run", "--config.steps=2"]
    assert vocojax(*train) == (0, "")
    for changed, message in (
        (["--config.seed=1"], f"{tmp_path}/run holds a run with another config (differing: seed): use the run's own"),
        ([f"--workdir={tmp_path}/wide", f"--config.init_from={tmp_path}/run", "--config.model.decoder.mlp_width=72"],
         "decoder/blocks/"),
        ([f"--workdir={tmp_path}/nan", "--config.steps=4", "--config.optimizer.warmup_share=0",
          "--config.optimizer.learning_rate=1e38"], "Lower optimizer.learning_rate or look at this step's data"),
    ):
        status, said = vocojax(*train, *changed)
        assert status == 1 and said.startswith("error: ") and "\n" not in said and message in said, said


def test_help_exits_with_0(vocojax, capsys):
    for words in (["--help"], ["help"], ["train", "--help"], ["train", "--helpfull"], ["help", "train"],
                  ["train", "--config.help"], ["config"], ["--version"]):
        assert vocojax(*words) == (0, ""), words
        assert capsys.readouterr().out.strip()


def test_a_mistake_has_a_status_of_its_own_where_it_is_asked_for(vocojax, root, monkeypatch):
    """Kubernetes reads it: a typo must not be restarted, other failures must."""
    monkeypatch.setenv("VOCOJAX_MISTAKE_STATUS", "64")
    for word in ("--config.step=4", "--wrkdir=x", "--config.steps=0", "--config.data.tokenizer=none", "now"):
        assert vocojax("train", f"--config={root}/tiny.py", f"--workdir={root}/run", word)[0] == 64
