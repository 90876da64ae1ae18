"""What a judge is, the prompts it gets (Video-ChatGPT's, word by word), and how its replies are read."""

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for question-answer "
    "pairs. Your task is to compare the predicted answer with the correct answer and determine if they match "
    "meaningfully. Here's how you can accomplish the task:"
    "------"
    "##INSTRUCTIONS: "
    "- Focus on the meaningful match between the predicted answer and the correct answer.\n"
    "- Consider synonyms or paraphrases as valid matches.\n"
    "- Evaluate the correctness of the prediction compared to the answer."
)
USER = (
    "Please evaluate the following video-based question-answer pair:\n\n"
    "Question: {question}\nCorrect Answer: {gold}\nPredicted Answer: {answer}\n\n"
    "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, with 5 "
    "indicating the highest meaningful match. Please generate the response in the form of a Python dictionary string "
    "with keys 'pred' and 'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in "
    "INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary "
    "string. For example, your response should look like this: {{'pred': 'yes', 'score': 4.8}}."
)


@dataclass(frozen=True)
class Pair:
    """An answer to be judged.

    Attributes:
      id: of the question.
      question: as it was asked.
      gold: the correct answer.
      answer: to be judged.
    """

    id: str
    question: str
    gold: str
    answer: str

    @property
    def prompt(self) -> str:
        """The judge's user turn."""
        return USER.format(question=self.question, gold=self.gold, answer=self.answer)


@dataclass(frozen=True)
class Verdict:
    """The reading of a reply.

    Attributes:
      says_yes: True for yes, False for no, None for neither.
      score: 0 to 5 as the judge is asked; truncated to a whole number and not clamped, as officially.
    """

    says_yes: bool | None
    score: int


class Judge(Protocol):
    """Replies to pairs.

    Attributes:
      name: of the model, stored with the score.
    """

    name: str

    def reply(self, pair: Pair) -> str:
        """Returns the raw reply about a pair; raises `JudgeError` if there is none."""
        ...


def prompt_digest() -> str:
    """Returns a digest of the prompts: scores compare only where it is the same."""
    return hashlib.sha256(f"{SYSTEM}\0{USER}".encode()).hexdigest()[:16]


def read_reply(reply: str) -> Verdict | None:
    """Reads a judge's reply: a Python literal with a text `pred` and a number `score`; None for anything else."""
    try:
        found = ast.literal_eval(reply)
        pred, score = found["pred"], int(found["score"])
        float(score)  # more would have no mean
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError, OverflowError):
        return None
    if not isinstance(pred, str):
        return None
    pred = pred.lower()
    return Verdict(True if "yes" in pred else False if "no" in pred else None, score)


@dataclass(frozen=True)
class JudgedScore:
    """The figures of a judge.

    Attributes:
      accuracy: yes of yes and no, in per cent; None if there is neither.
      score: the mean of the scores, 0 to 5; None if no reply could be read.
      judged: replies that could be read.
      neither: of them, those that say neither yes nor no; they are in the score but not in the accuracy.
      malformed: pairs without a reply that could be read, after all tries; they are in neither figure.
    """

    accuracy: float | None
    score: float | None
    judged: int
    neither: int
    malformed: int


def judged_score(verdicts: Sequence[Verdict | None]) -> JudgedScore:
    """Returns the figures of verdicts, None for a pair without one."""
    found = [verdict for verdict in verdicts if verdict is not None]
    yes = sum(verdict.says_yes is True for verdict in found)
    no = sum(verdict.says_yes is False for verdict in found)
    return JudgedScore(
        accuracy=100 * yes / (yes + no) if yes + no else None,
        score=sum(verdict.score for verdict in found) / len(found) if found else None,
        judged=len(found), neither=len(found) - yes - no, malformed=len(verdicts) - len(found),
    )
