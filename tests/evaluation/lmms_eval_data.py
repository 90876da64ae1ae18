"""Run by the Python of an environment with lmms-eval: writes POPE and MME as its installed tasks read them.

    python lmms_eval_data.py QUESTIONS.json TASKS

QUESTIONS.json holds, by task, records of the task's columns, with an image's path under `image`. TASKS receives a
parquet file and a task `local_NAME` for each, whose YAML includes the installed one.
"""

import json
import sys
from pathlib import Path

import datasets
import lmms_eval

questions, tasks = Path(sys.argv[1]), Path(sys.argv[2])
installed = Path(lmms_eval.__file__).parent / "tasks"
for name, records in json.loads(questions.read_text()).items():
    columns = {column: [record[column] for record in records] for column in records[0]}
    kinds = {column: datasets.Value("string") for column in columns} | {"image": datasets.Image()}
    data = tasks / f"{name}.parquet"
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(data)
    (tasks / f"local_{name}.yaml").write_text(
        f"include: {installed / name / name}.yaml\ntask: local_{name}\ndataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "generation_kwargs:\n  max_new_tokens: 1\n  temperature: 0\n  do_sample: false\n")
