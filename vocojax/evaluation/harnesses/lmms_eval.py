r"""lmms-eval's model `vocojax`: its chat requests, answered in batches from VoCo caches.

    python -m lmms_eval --model vocojax --model_args pretrained=runs/voco,store=caches,num_vocos=1 --tasks pope,mme \
        --batch_size 32

The class is found through the entry point that `registration.py` holds. It is written for lmms-eval 0.7.3. In a run of
several processes (`accelerate launch`, `torchrun`) each process answers its share with devices of its own.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from vocojax.config import SEEDS
from vocojax.errors import InputError, VocojaxError
from vocojax.evaluation.harnesses.answering import Answering, report_unused, require_known
from vocojax.evaluation.harnesses.messages import Message, generation_of, request_of
from vocojax.inference.requests import Answer, Request
from vocojax.inference.visuals import VisualSource

FIRST = 3  # requests that an error names


class VocojaxModel(lmms):
    """A model of vocojax for lmms-eval.

    Args:
      pretrained: directory of the weights, in any layout, or of a run of training.
      batch_size: lmms-eval's `--batch_size`; a number.
      max_batch_size: lmms-eval's; of no use here.
      device: lmms-eval's `--device`; must not be given, JAX finds its devices.
      max_new_tokens: length limit of answers where a task does not state one.
      seed: of draws, where a task asks for them.
      arguments: further ones of `Answering`: store, num_vocos, frames, frame_sampling, visibility, template, dtype,
        mesh.

    Raises:
      InputError: an argument is unknown or can't be used.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_new_tokens: int = 1024,
        seed: int = 0,
        **arguments: Any,
    ):
        super().__init__()
        del max_batch_size
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"--batch_size must be a whole number >= 1, got {batch_size!r}")
        if device is not None:
            raise InputError(f"--device is {device!r}, but JAX finds its devices; leave it out (JAX_PLATFORMS=cpu asks "
                             "for the CPU)")
        require_known(arguments, ("max_new_tokens", "seed"))
        self.accelerator = Accelerator()
        self.device = self.accelerator.device  # of the tensors that lmms-eval gathers from all processes
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        _take_own_gpu()
        texts = {name: str(arguments[name]) for name in ("mesh", "store") if arguments.get(name) is not None}
        self._answering = Answering(str(pretrained), batch_size=int(batch_size), **(arguments | texts))
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._reported: set[tuple[str, str]] = set()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers chat requests in batches.

        Raises:
          InputError: a request can't be answered; names the first ones of its batch.
        """
        found = []
        for batch, seeds in self._batches(requests):
            prompts = [self._request(instance, self._first_messages(instance), seed)
                       for instance, seed in zip(batch, seeds, strict=True)]
            for instance, answer in zip(batch, self._answers(batch, prompts), strict=True):
                counts = TokenCounts(answer.prompt_tokens, answer.answer_tokens)
                found.append(GenerationResult(answer.text.strip(), counts))
                self.cache_hook.add_partial("generate_until", (instance.args[0], instance.args[2]), found[-1].text)
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Answers requests that a task continues after each answer; returns each one's answers, round by round."""
        found: list[list[str]] = []
        for batch, seeds in self._batches(requests):
            texts: list[list[str]] = [[] for _ in batch]
            waiting = {number: self._first_messages(instance) for number, instance in enumerate(batch)}
            notes: dict[int, Any] = {}
            while waiting:
                prompts = [self._request(batch[number], messages, seeds[number] + len(texts[number]))
                           for number, messages in waiting.items()]
                answers = self._answers([batch[number] for number in waiting], prompts)
                asked, waiting = list(waiting), {}
                for number, answer in zip(asked, answers, strict=True):
                    texts[number].append(answer.text.strip())
                    messages, notes[number] = self._next_messages(batch[number], texts[number], notes.get(number))
                    if messages is not None:
                        waiting[number] = messages
            found += texts
        return found

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuses: chat requests are generated."""
        raise InputError("vocojax answers tasks that generate text; choose tasks with output_type generate_until")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[tuple[Sequence[Instance], list[int]]]:
        """Yields batches of requests with their seeds, which do not depend on batches and processes.

        Repeats of one question have different seeds.
        """
        times: Counter[tuple[Any, ...]] = Counter()
        size = self._answering.batch_size
        with tqdm(total=len(requests), desc="vocojax", unit="request", disable=self.rank != 0) as bar:
            for first in range(0, len(requests), size):
                batch, seeds = requests[first : first + size], []
                for instance in batch:
                    doc_id, task, split = instance.args[3:]
                    times[doc_id, task, split] += 1
                    name = f"{task}/{split}/{doc_id}/{times[doc_id, task, split]}"
                    seeds.append(self._seed + zlib.crc32(name.encode()))
                yield batch, seeds
                bar.update(len(batch))

    def _first_messages(self, instance: Instance) -> Any:
        _, doc_to_messages, _, doc_id, task, split = instance.args
        return doc_to_messages(self.task_dict[task][split][doc_id])

    def _next_messages(self, instance: Instance, texts: Sequence[str], notes: Any) -> tuple[Any, Any]:
        """Returns the messages of the next round, None after the last one, and the task's own notes."""
        _, doc_to_messages, _, doc_id, task, split = instance.args
        found = doc_to_messages(self.task_dict[task][split][doc_id], round_idx=len(texts), previous_output=list(texts),
                                previous_round_info=notes)
        if not isinstance(found, tuple) or len(found) != 4:
            return None, None
        messages, is_last, _, notes = found
        return (None if is_last else messages), notes

    def _request(self, instance: Instance, messages: Any, seed: int) -> Request:
        """Returns an instance's messages as a request."""
        _, _, settings, doc_id, task, _ = instance.args
        try:
            generation = generation_of(settings or {}, self._max_new_tokens, seed % SEEDS, self._answering.longest)
            request = request_of(list(self._messages(messages)), generation.sampling)
        except VocojaxError as error:
            raise InputError(f"task {task}, document {doc_id}: {error}") from error
        new = {name: value for name, value in generation.unused.items() if (task, name) not in self._reported}
        self._reported |= {(task, name) for name in new}
        report_unused(new, f"task {task}")
        return request

    def _messages(self, messages: Any) -> Iterator[Message]:
        """Yields a task's messages, `[{"role": ..., "content": text or parts}, ...]`."""
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = tuple(part["text"] for part in parts if part["type"] == "text")
            visuals = tuple(self._visual(part) for part in parts if part["type"] != "text")
            yield Message(message["role"], texts, visuals)

    def _visual(self, part: Any) -> VisualSource:
        """Returns an image or a video of a message."""
        kind, source = part["type"], part.get("url")
        if kind not in ("image", "video"):
            raise InputError(f"a message holds {kind}; this model reads texts, images and videos")
        details = source if isinstance(source, dict) else {}
        cut = [name for name in ("start_time", "end_time") if part.get(name) is not None]
        cut += [name for name in ("video_start", "video_end") if details.get(name) is not None]
        if cut:
            raise InputError(f"a message holds a part of a video ({', '.join(cut)}); cut the file and name the part")
        found: Any = next((details[name] for name in ("url", "path") if name in details), source)
        return found if kind == "image" else self._answering.video(found)

    def _answers(self, batch: Sequence[Instance], prompts: Sequence[Request]) -> list[Answer]:
        """Answers requests; one that can't be answered ends the run."""
        answers = self._answering.answers(prompts)
        failed = [f"task {instance.args[4]}, document {instance.args[3]} ({answer.error})"
                  for instance, answer in zip(batch, answers, strict=True) if answer.error]
        if failed:
            more = f" and {len(failed) - FIRST:,} more of this batch" if len(failed) > FIRST else ""
            raise InputError(f"{len(failed):,} requests can't be answered: {'; '.join(failed[:FIRST])}{more}")
        return answers


def _take_own_gpu() -> None:
    """Leaves the other GPUs of a machine to the other processes on it."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and "JAX_CUDA_VISIBLE_DEVICES" not in os.environ:
        jax.config.update("jax_cuda_visible_devices", os.environ.get("LOCAL_RANK", "0"))
