"""A judge behind an OpenAI-compatible endpoint."""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from vocojax.errors import InputError
from vocojax.evaluation.judge.base import SYSTEM, Pair

KEY = "OPENAI_API_KEY"
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # statuses after which the same request may succeed


class JudgeError(InputError):
    """A judge that does not reply."""


@dataclass
class EndpointJudge:
    """A model that `URL/chat/completions` runs; its key is read from the environment.

    Attributes:
      url: of the endpoint, such as `https://api.openai.com/v1`.
      name: of the model.
      tries: requests about one pair before giving up.
      first_wait: seconds before the second try; each further wait is twice as long, at most a minute.
      seconds: time limit of a request.
      usage: tokens so far, `prompt_tokens` and `completion_tokens`, as the endpoint reports them.
    """

    url: str
    name: str
    tries: int = 6
    first_wait: float = 1.0
    seconds: float = 120.0
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0})

    def reply(self, pair: Pair) -> str:
        """Returns the raw reply.

        Raises:
          JudgeError: the endpoint refuses, or does not answer after all tries.
        """
        for number in range(self.tries):
            try:
                return self._ask(pair)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(300).decode(errors="replace").split())
                problem = f"status {error.code}: {said}"
                if error.code not in AGAIN:
                    raise JudgeError(f"{self.url}: the judge refuses with {problem}; is {KEY} set, and the model's "
                                     f"name {self.name!r} right?") from error
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError,
                    RecursionError) as error:  # no connection, or a body of another form
                problem = f"{type(error).__name__}: {error}"
            if number + 1 < self.tries:
                time.sleep(min(60.0, self.first_wait * 2**number) * random.uniform(0.75, 1.25))
        raise JudgeError(f"{self.url}: the judge did not reply in {self.tries} tries, the last time: {problem}; run "
                         "the same command to resume")

    def _ask(self, pair: Pair) -> str:
        body = {"model": self.name, "temperature": 0, "messages": [
            {"role": "system", "content": SYSTEM}, {"role": "user", "content": pair.prompt}]}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.seconds) as response:
            content: dict[str, Any] = json.load(response)
        for name in self.usage:
            self.usage[name] += int((content.get("usage") or {}).get(name, 0))
        text = content["choices"][0]["message"]["content"]
        if text is None:  # what endpoints return in place of a filtered reply
            return ""
        if not isinstance(text, str):
            raise TypeError(f"its reply holds no text: {text!r}")
        return text
