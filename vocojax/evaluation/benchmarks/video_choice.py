"""What the multiple-choice video benchmarks share: options by letter, and one simple reader of answers."""

from collections.abc import Sequence

from vocojax.evaluation.benchmarks.base import LETTER_ANSWER, Benchmark, Item, Missing
from vocojax.evaluation.metrics.choices import LETTERS, option_letter


class VideoChoice(Benchmark):
    """Questions about videos whose gold answer is a letter; an item's record holds its options under `options`.

    Their authors publish no reader of generated answers: `metrics.choices.option_letter` is ours.
    """

    missing = Missing(True, "publishes no script for generated answers")
    text_fields = ("text", "answer", "pred", "prediction", "response")
    notes: tuple[str, ...] = ("no official reader of generated answers: metrics.choices.option_letter",)

    def mark(self, item: Item, text: str, convention: str) -> float | None:
        """Returns 1 if the letter that the answer states is right."""
        letter = option_letter(text, item.record["options"])
        return None if letter is None else float(letter == item.gold)


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """Returns a question with its options by letter, as LLaVA asks multiple-choice questions."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
                     ) + LETTER_ANSWER
