"""VLMEvalKit's model `vocojax`: a wrapper that answers one message at a time.

VLMEvalKit has no entry points. At the end of `vlmeval/config.py` of its checkout these lines register a model:

    from vocojax.evaluation.harnesses.vlmevalkit import VocojaxModel
    supported_VLM["vocojax"] = partial(VocojaxModel, pretrained="runs/voco", store="caches")

after which `python run.py --model vocojax --data POPE MME` asks it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from vocojax.errors import InputError
from vocojax.evaluation.harnesses.answering import Answering, report_unused, require_known
from vocojax.evaluation.harnesses.messages import ROLES, Message, generation_of, request_of
from vocojax.inference.visuals import VisualSource

SETTINGS = ("until", "temperature", "top_p", "top_k", "do_sample", "repetition_penalty", "num_beams",
            "seed")


class VocojaxModel(BaseModel):
    """A model of vocojax for VLMEvalKit.

    Args:
      pretrained: directory of the weights, in any layout, or of a run of training.
      max_new_tokens: length limit of answers.
      arguments: further ones of `Answering` (store, num_vocos, frames, ...), and generation settings (temperature,
        top_p, ...); greedy by default.

    Raises:
      InputError: an argument is unknown or can't be used.
    """

    is_api = False
    INTERLEAVE = True  # several images; they are read before the text
    VIDEO_LLM = True
    allowed_types = ["text", "image", "video"]  # noqa: RUF012 (VLMEvalKit's own form)

    def __init__(self, pretrained: str, max_new_tokens: int = 1024, **arguments: Any):
        super().__init__()
        settings = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
        require_known(arguments, (*SETTINGS, "max_new_tokens"))
        self._answering = Answering(str(pretrained), **arguments)
        self._sampling, unused = generation_of(settings, max_new_tokens, 0, self._answering.longest)
        report_unused(unused, "VLMEvalKit")
        # VLMEvalKit replaces this number by the data set's own before it asks about videos.
        self.nframe = arguments.get("frames", 8)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answers a message.

        Args:
          message: `[{"type": "text" | "image" | "video", "value": text or path, "role"?: ...}, ...]`, one user's turn
            where no roles are given.
          dataset: the data set's name; all are asked alike.

        Raises:
          InputError: it can't be answered.
        """
        return self._answer([self._message(part) for part in message])

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answers a conversation: turns `{"role": ..., "content": message}`, the last one the user's."""
        return self._answer([self._message(part, turn["role"]) for turn in message for part in turn["content"]])

    def _answer(self, messages: Iterable[Message]) -> str:
        """Answers messages; system texts come first, wherever they stand."""
        said = sorted(messages, key=lambda each: each.role != "system")
        (answer,) = self._answering.answers([request_of(said, self._sampling)])
        if answer.error:
            raise InputError(f"a message can't be answered: {answer.error}")
        return answer.text.strip()

    def _message(self, part: Mapping[str, Any], role: str = ROLES[1]) -> Message:
        kind, value = part["type"], part["value"]
        if kind not in self.allowed_types:
            raise InputError(f"a message holds {kind}; this model reads texts, images and videos")
        if kind == "text":
            return Message(part.get("role", role), (value,))
        visual: VisualSource = value if kind == "image" else self._answering.video(value, self.nframe)
        return Message(part.get("role", role), (), (visual,))
