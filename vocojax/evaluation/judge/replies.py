"""Judging of a benchmark's answers: replies are stored as they come, and scores are read from the stored ones."""

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vocojax.errors import InputError
from vocojax.evaluation.benchmarks.base import Item, Result
from vocojax.evaluation.judge.base import Judge, JudgedScore, Pair, judged_score, prompt_digest, read_reply
from vocojax.files import json_line, parse_json

MOST_REPLIES = 3  # malformed replies to a pair before it counts as malformed


def judge_pairs(judge: Judge, pairs: Sequence[Pair], path: Path, threads: int = 1) -> JudgedScore:
    """Asks a judge about pairs and returns its figures.

    Every reply is appended to `path` with the judge's name and the digest of its prompts, malformed ones too. A pair
    with a reply that can be read, or with three that can't, is not asked about again.

    Args:
      judge: is asked.
      pairs: to be judged.
      path: a local file of the replies; may hold those of an earlier, interrupted run.
      threads: pairs that are asked about at the same time.

    Raises:
      InputError: the file holds another judge's replies, or replies about other answers; or the judge does not reply.
    """
    replies = stored_replies(path, pairs, judge.name)
    waiting = [pair for pair in pairs if _is_open(replies.get(pair.id, []))]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(threads) as pool, tqdm(
        total=len(waiting), desc=f"judge {judge.name}", unit="answer", disable=not waiting
    ) as bar:

        def ask(pair: Pair) -> None:
            own = list(replies.get(pair.id, []))
            while _is_open(own):
                own.append(judge.reply(pair))
                line = json_line({"id": pair.id, "prompt": pair.prompt, "reply": own[-1], "judge": judge.name,
                                  "prompts": prompt_digest()})
                with lock:
                    file.write(line + "\n")
                    file.flush()
            bar.update()

        try:
            for _ in pool.map(ask, waiting):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return stored_score(path, pairs, judge.name)


def stored_score(path: Path, pairs: Sequence[Pair], judge: str) -> JudgedScore:
    """Returns the figures of stored replies; asks no judge."""
    replies = stored_replies(path, pairs, judge)
    verdicts = ([verdict for reply in replies.get(pair.id, []) if (verdict := read_reply(reply))] for pair in pairs)
    return judged_score([found[0] if found else None for found in verdicts])


def stored_replies(path: Path, pairs: Sequence[Pair], judge: str) -> dict[str, list[str]]:
    """Reads the replies about pairs, in their order, by the questions' ids.

    Raises:
      InputError: they are another judge's, of other prompts, or about other answers.
    """
    prompts = {pair.id: pair.prompt for pair in pairs}
    found: dict[str, list[str]] = {}
    for number, record in _lines(path):
        if (record["judge"], record["prompts"]) != (judge, prompt_digest()):
            raise InputError(f"{path}, line {number}: is a reply of the judge {record['judge']} to prompts "
                             f"{record['prompts']}, here {judge} and {prompt_digest()}; name another file")
        if record["id"] in prompts:
            if record["prompt"] != prompts[record["id"]]:
                raise InputError(f"{path}, line {number}: is about another answer to {record['id']!r}; name another "
                                 "file")
            found.setdefault(record["id"], []).append(record["reply"])
    return found


def _is_open(replies: Sequence[str]) -> bool:
    return len(replies) < MOST_REPLIES and not any(read_reply(reply) for reply in replies)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the lines of a file of replies; a last line that a kill has torn is cut off."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line)
            assert all(isinstance(record[name], str) for name in ("id", "prompt", "reply", "judge", "prompts"))
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise InputError(f"{path}, line {number}: is no stored reply") from error
        yield number, record


def pairs_of(items: Sequence[Item], texts: Sequence[str | None]) -> list[Pair]:
    """Returns a benchmark's answers as pairs to judge; missing ones are left out, as officially."""
    return [Pair(item.id, item.prompt, item.gold, text) for item, text in zip(items, texts, strict=True)
            if text is not None]


def with_judge(result: Result, judged: JudgedScore, judge: str, usage: Mapping[str, int] | None = None) -> Result:
    """Returns a score with the judge's figures before the exact match.

    Args:
      result: by exact match.
      judged: the judge's figures.
      judge: its name.
      usage: tokens that the judge took, where they are known.
    """
    figures = {"judge's accuracy": judged.accuracy, "judge's score (0 to 5)": judged.score}
    known = {name: value for name, value in figures.items() if value is not None}
    notes = [f"judge {judge}, prompts {prompt_digest()}: {judged.judged:,} replies read, {judged.neither:,} neither "
             f"yes nor no, {judged.malformed:,} malformed (in neither figure); judges differ by 8 to 10 points"]
    if usage:
        notes.append("the judge took " + " and ".join(f"{count:,} {name}" for name, count in usage.items()))
    exact = {f"exact match: {name}": value for name, value in result.metrics.items()}
    return dataclasses.replace(result, convention=f"{result.convention}, judge {judge}", metrics=known | exact,
                               notes=(*result.notes, *notes))
