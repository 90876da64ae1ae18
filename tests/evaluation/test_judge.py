"""Judges: readings of replies on literal cases, and an endpoint that is a real HTTP server of the test's own."""

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.evaluation.yes_no_model import save_yes_no_model
from tests.helpers.environment import on_cpu
from vocojax.data.conversation import template
from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.registry import open_benchmark
from vocojax.evaluation.judge.base import SYSTEM, Pair, Verdict, judged_score, read_reply
from vocojax.evaluation.judge.endpoint import EndpointJudge, JudgeError
from vocojax.evaluation.judge.local import LocalJudge
from vocojax.evaluation.judge.replies import judge_pairs, pairs_of, stored_score, with_judge
from vocojax.inference.assistant import Assistant
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Answer, Request

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("reply", "verdict"), [
    ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),  # truncated
    ('{"pred": "No", "score": 2}', Verdict(False, 2)),
    ("{'pred': 'yes', 'score': '3'}", Verdict(True, 3)),
    ("{'pred': 'maybe', 'score': 3}", Verdict(None, 3)),
    ("{'pred': 'not yes', 'score': 7}", Verdict(True, 7)),  # yes first; no clamp
    ("  {'pred': 'yes', 'score': 4}", Verdict(True, 4)),
    ("Sure! {'pred': 'yes', 'score': 4}", None), ("```{'pred': 'yes', 'score': 4}```", None),
    ("{'pred': 'yes'}", None), ("{'pred': True, 'score': 4}", None), ("{'pred': 'yes', 'score': 'high'}", None),
    ("{'pred': 'yes', 'score': None}", None), ("['yes', 4]", None), ("yes", None), ("", None), ("(" * 500, None),
    ('{"pred": "yes", "score": true}', None),  # JSON's true is no Python
    ("{'pred': b'yes', 'score': 4}", None), ("{'pred': 'yes', 'score': 1e400}", None),
    ("{'pred': 'yes', 'score': 1" + "0" * 400 + "}", None),  # has no mean
    ("{'pred': 'yes', 'score': -1.5}", Verdict(True, -1)), ("{'pred': 'nothing', 'score': 0}", Verdict(False, 0)),
])
def test_replies(reply, verdict):
    assert read_reply(reply) == verdict


def test_figures():
    found = judged_score([Verdict(True, 4), Verdict(True, 5), Verdict(False, 0), Verdict(None, 3), None])
    assert found.accuracy == pytest.approx(100 * 2 / 3) and found.score == 3.0
    assert (found.judged, found.neither, found.malformed) == (4, 1, 1)
    assert judged_score([None]).accuracy is None and judged_score([None]).score is None


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Replies by the server's `replies(question of the pair, times it was asked)`: a text, or a status."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][1]["content"]
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body["model"], prompt))
            times = sum(seen[3] == prompt for seen in self.server.seen)
        reply = self.server.replies(prompt.split("Question: ")[1].split("\n")[0], times)
        if isinstance(reply, int):
            self.send_error(reply)
            return
        content = reply if isinstance(reply, bytes) else json.dumps({
            "choices": [{"message": {"content": reply}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    found.seen, found.lock = [], threading.Lock()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def judge(server, tries=3):
    return EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1", "tiny-judge", tries=tries, first_wait=0.001)


PAIRS = [Pair(f"q{i}", f"question {i}", "running", f"answer {i}") for i in range(4)]


def test_endpoint_retries_stores_and_counts(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.replies = lambda question, times: {
        "question 0": "{'pred': 'yes', 'score': 4.8}",
        "question 1": 503 if times == 1 else "{'pred': 'no', 'score': 1}",  # a try that fails
        "question 2": "well..." if times < 3 else "{'pred': 'yes', 'score': 5}",  # two malformed replies
        "question 3": "never a dict",
    }[question]
    path, judges = tmp_path / "judge.jsonl", judge(server)
    found = judge_pairs(judges, PAIRS, path, threads=3)
    assert (found.accuracy, found.score, found.judged, found.malformed) == (pytest.approx(200 / 3), 10 / 3, 3, 1)
    assert judges.usage == {"prompt_tokens": 80, "completion_tokens": 16}  # 1 + 1 + 3 + 3 replies
    assert all(path == "/v1/chat/completions" and key == "Bearer secret" and model == "tiny-judge"
               for path, key, model, _ in server.seen)
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(stored) == 8 and "secret" not in path.read_text()
    # Scores are read from the stored replies, without the judge.
    asked = len(server.seen)
    assert judge_pairs(judge(server), PAIRS, path) == found == stored_score(path, PAIRS, "tiny-judge")
    assert len(server.seen) == asked


def test_an_interrupted_judging_resumes(server, tmp_path):
    path = tmp_path / "judge.jsonl"
    server.replies = lambda question, times: 500 if question == "question 2" else "{'pred': 'yes', 'score': 4}"
    with pytest.raises(JudgeError, match=r"did not reply in 3 tries, the last time: status 500.*to resume"):
        judge_pairs(judge(server), PAIRS, path)
    with open(path, "a") as file:
        file.write('{"id": "q2", "prompt": "torn')
    server.replies = lambda question, times: "{'pred': 'no', 'score': 0}"
    before = len(server.seen)
    assert judge_pairs(judge(server), PAIRS, path).judged == 4
    again = "".join(prompt for *_, prompt in server.seen[before:])
    assert "question 2" in again and "question 0" not in again and "question 1" not in again


def test_replies_may_be_of_any_characters(server, tmp_path):
    server.replies = lambda question, times: "\ud83d {'pred': 'yes', 'score': 4}"  # half a pair
    assert judge_pairs(judge(server), PAIRS[:1], tmp_path / "judge.jsonl").malformed == 1
    stored = [json.loads(line)["reply"] for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert stored == ["\ud83d {'pred': 'yes', 'score': 4}"] * 3
    (tmp_path / "judge.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match=r"judge.jsonl, line 1: is no stored reply"):
        stored_score(tmp_path / "judge.jsonl", PAIRS, "tiny-judge")


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"choices": []}', b'{"usage": 3}', b"[" * 100_000,
                                  b'{"choices": [{"message": {"content": ["text"]}}]}', b"<html>", b"\xff"])
def test_bodies_of_another_form_are_asked_for_again(server, tmp_path, body):
    server.replies = lambda question, times: body if times == 1 else "{'pred': 'yes', 'score': 4}"
    assert judge_pairs(judge(server), PAIRS[:1], tmp_path / "judge.jsonl").judged == 1
    server.replies = lambda question, times: body
    with pytest.raises(JudgeError, match=r"did not reply in 3 tries, the last time: .*; run the same command"):
        judge_pairs(judge(server), PAIRS[1:2], tmp_path / "judge.jsonl")


def test_a_filtered_reply_is_malformed(server, tmp_path):
    server.replies = lambda question, times: None
    assert judge_pairs(judge(server), PAIRS[:1], tmp_path / "judge.jsonl").malformed == 1


def test_a_model_of_ours_is_a_judge(tiny_model, words, tmp_path):
    """It says nothing that can be read: three replies a pair are stored, and counted as malformed."""
    assistant = Assistant(tiny_model, words, template("short"))
    found = judge_pairs(LocalJudge(assistant, "tiny"), PAIRS[:2], tmp_path / "judge.jsonl")
    assert (found.judged, found.malformed, found.accuracy, found.score) == (0, 2, None, None)
    stored = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [each["id"] for each in stored] == ["q0"] * 3 + ["q1"] * 3 and {each["judge"] for each in stored} == {"tiny"}
    request = Request(PAIRS[0].prompt, sampling=SamplingConfig(max_new_tokens=32), system=SYSTEM)
    (answer,) = answer_many(assistant, [request], progress=None)
    assert {each["reply"] for each in stored[:3]} == {answer.text.strip()}
    with pytest.raises(InputError, match=r"the judge tiny can't reply about 'long': .*too long|more than the"):
        judge_pairs(LocalJudge(assistant, "tiny"), [Pair("long", "red " * 5000, "red", "red")], tmp_path / "long.jsonl")


def test_a_model_that_replies_as_asked(tiny_model, words, tmp_path, monkeypatch):
    assistant = Assistant(tiny_model, words, template("short"))
    monkeypatch.setattr("vocojax.evaluation.judge.local.answer_many", lambda assistant, requests, progress: [
        Answer(" {'pred': 'yes', 'score': 4.8}\n", "stop") for _ in requests])
    found = judge_pairs(LocalJudge(assistant, "tiny"), PAIRS, tmp_path / "judge.jsonl")
    assert (found.accuracy, found.score, found.judged) == (100.0, 4.0, 4)


@pytest.mark.slow
def test_hosts_wait_for_a_judge_that_takes_longer_than_a_minute(server, data_root, tmp_path):
    def reply(question, times):
        if not slept.is_set():
            slept.set()
            time.sleep(75)  # JAX ends a process a minute after another one has left
        return "{'pred': 'yes', 'score': 4}"

    server.replies, slept = reply, threading.Event()
    checkpoint = save_yes_no_model(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, ROOT / "launch" / "evaluate.py", "--benchmarks=msvd_qa", f"--data_root={data_root}",
               f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}", "--judge_model=tiny-judge",
               f"--judge=http://127.0.0.1:{server.server_port}/v1", f"--coordinator_address={address}",
               "--num_processes=2"]
    hosts = [subprocess.Popen([*command, f"--process_id={index}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, env={"PATH": "/usr/bin:/bin", **on_cpu()}) for index in (0, 1)]
    said = [host.communicate(timeout=400)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    result = json.loads((tmp_path / "out" / "msvd_qa" / "result.json").read_text())
    assert result["metrics"]["judge's accuracy"] == 100.0 and len(server.seen) == 3
    assert "msvd_qa: judge's accuracy 100.00" in said[0] and "msvd_qa: judge's accuracy" not in said[1]


def test_refusals_are_not_tried_again(server, tmp_path):
    server.replies = lambda question, times: 401
    with pytest.raises(JudgeError, match=r"refuses with status 401.*OPENAI_API_KEY"):
        judge_pairs(judge(server), PAIRS[:1], tmp_path / "judge.jsonl")
    assert len(server.seen) == 1


def test_replies_of_another_judge_or_about_other_answers_are_refused(server, tmp_path):
    server.replies = lambda question, times: "{'pred': 'yes', 'score': 4}"
    path = tmp_path / "judge.jsonl"
    judge_pairs(judge(server), PAIRS, path)
    with pytest.raises(InputError, match="line 1: is a reply of the judge tiny-judge"):
        stored_score(path, PAIRS, "other-judge")
    with pytest.raises(InputError, match="line 2: is about another answer to 'q1'"):
        stored_score(path, [Pair("q1", "question 1", "running", "another answer")], "tiny-judge")


def test_exact_match_is_reported_beside_the_judge(data_root):
    benchmark = open_benchmark("msvd_qa", data_root)
    texts = ["running", "he runs", None]
    pairs = pairs_of(benchmark.items, texts)
    assert [pair.answer for pair in pairs] == ["running", "he runs"]
    judged = judged_score([Verdict(True, 5), Verdict(True, 4)])
    result = with_judge(benchmark.score(texts), judged, "tiny-judge", {"prompt_tokens": 7})
    assert result.metrics == {"judge's accuracy": 100.0, "judge's score (0 to 5)": 4.5, "exact match: accuracy": 50.0}
    assert result.convention == "official, judge tiny-judge"
    assert "judge tiny-judge, prompts " in result.notes[1] and result.notes[2] == "the judge took 7 prompt_tokens"
