"""Reads every record of a stage's data and reports what is wrong and how it fills rows.

    vocojax check_data --config=voco --config.data.path=mix.json --config.data.image_root=images \\
        --config.data.tokenizer=vicuna-7b-v1.5 --output=data_check

Writes to the output directory: report.json (all figures and every bad record), bad.csv (the bad records with reasons)
and rows.html (packed rows: images, tokens coloured by role, targets underlined, the mask). Prints the figures. Fails if
more records are bad than `data.max_skipped_share` allows a run.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vocojax.cli import config_flag
from vocojax.cli.flag_checks import refuse_arguments, refuse_empty
from vocojax.errors import InputError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag.define_config("The stage whose data is read.")
    flags.DEFINE_string("output", "data_check", "Directory of the report.")
    flags.DEFINE_integer("threads", None, "Threads that read; default: data.num_threads.", lower_bound=1)
    flags.DEFINE_integer("rows", 4, "Rows on the page.", lower_bound=1)
    flags.DEFINE_integer("limit", None, "Look at this many records, evenly spread; default: all.", lower_bound=1)
    flags.DEFINE_bool("decode", True, "Decode images and frames too; without it only their files' headers are read.")
    flags.DEFINE_bool("validation", False, "Read the data of `validation` in place of that of `data`.")
    refuse_empty("output")


def main(arguments: Sequence[str]) -> None:
    """Reads and reports."""
    refuse_arguments(arguments)
    config = config_flag.stage()
    from vocojax.data.checking import check, first_rows
    from vocojax.data.loader import BatchStream
    from vocojax.data.row_page import page
    from vocojax.files import write_atomically
    from vocojax.training.plan import views
    from vocojax.training.validation import validation_data

    if FLAGS.validation and not config.validation.every:
        raise InputError("--validation needs a config with validation.every > 0: set --config.validation.every, .path "
                         "and .image_root")
    data = validation_data(config.data, config.validation) if FLAGS.validation else config.data
    data = dataclasses.replace(data, num_workers=0, keep_in_memory=False)
    stream = BatchStream(config.model, data, config.batch_size, config.seed, *views(config), plan=config.plan)
    stream.close()  # no batch is taken
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    report = check(stream, FLAGS.threads or data.num_threads, FLAGS.decode, FLAGS.limit)
    write_atomically(output / "report.json", report.to_json())
    write_atomically(output / "bad.csv", report.to_csv())
    if not report.usable:
        raise InputError(f"none of the {report.records} records can be used: {output / 'bad.csv'} says why")
    write_atomically(output / "rows.html", page(first_rows(stream, FLAGS.rows), stream.shape, stream.tokenizer))
    print(report)
    print(f"wrote {output / 'report.json'}, {output / 'bad.csv'} and {output / 'rows.html'}")
    if len(report.bad) > data.max_skipped_share * max(report.records, 1000):
        raise InputError(f"{len(report.bad)} of {report.records} records can't be used, more than "
                         f"data.max_skipped_share {data.max_skipped_share:g} allows a run: {output / 'bad.csv'} names "
                         "them")
