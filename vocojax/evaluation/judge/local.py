"""A judge that is a model of ours, asked without any image."""

from dataclasses import dataclass

from vocojax.errors import InputError
from vocojax.evaluation.judge.base import SYSTEM, Pair
from vocojax.inference.assistant import Assistant
from vocojax.inference.decoding.sampling import SamplingConfig
from vocojax.inference.many import answer_many
from vocojax.inference.requests import Request


@dataclass
class LocalJudge:
    """A model that reads the judge's prompt as text.

    Attributes:
      assistant: replies.
      name: of the model.
    """

    assistant: Assistant
    name: str

    def reply(self, pair: Pair) -> str:
        """Returns the raw reply.

        Raises:
          InputError: the prompt is too long for the model.
        """
        request = Request(pair.prompt, sampling=SamplingConfig(max_new_tokens=32), system=SYSTEM)
        (answer,) = answer_many(self.assistant, [request], progress=None)
        if answer.error:
            raise InputError(f"the judge {self.name} can't reply about {pair.id!r}: {answer.error}")
        return answer.text.strip()
